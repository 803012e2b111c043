"""What options name outside of miinb is checked, and its paths made absolute, before anything starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from miinb import calibration, offloading
from miinb.config import DeploymentConfig
from miinb.demo import tiny_model
from miinb.errors import InvalidValue
from miinb.preparation import prepare


def options(**given: Any) -> DeploymentConfig:
    dtype = "int4" if "calibration" in given else "auto"
    return DeploymentConfig.parse({"model": str(tiny_model()), "device": "cpu", "dtype": dtype, "options": given})


def write(file: Path, content: bytes) -> str:
    file.write_bytes(content)
    return str(file)


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "text.txt", "Some text: \u00fc.".encode())
    monkeypatch.chdir(tmp_path)
    ready = prepare(options(calibration="text.txt"))
    for config in (ready.config, ready.resolved):
        assert config.options.calibration == str(tmp_path / "text.txt")
    assert prepare(options(calibration=["Some text."])).config.options.calibration == ["Some text."]
    monkeypatch.setattr(offloading, "find_library", lambda name: "libaio.so.1")
    ready = prepare(options(offload="nvme", offload_folder="."))
    assert ready.resolved.options.offload_folder == str(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"], "what was written to see whether it can be"


@pytest.mark.parametrize("source", [[], [""], ["", " \n"]])
def test_a_list_without_text_is_refused(source: list[str]) -> None:
    with pytest.raises(InvalidValue, match=r"options\.calibration: the list holds no text"):
        prepare(options(calibration=source))


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "holds no text"), (b" \n", "holds no text"), (b"\xff\xfe", "cannot be read"), (b"a\0b", "a NUL character")],
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(InvalidValue, match=words) as caught:
        prepare(options(calibration=write(tmp_path / "text.txt", content)))
    assert "text.txt" in caught.value.message
    assert "text file" in caught.value.hint


def test_what_is_no_file_of_a_text_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    with (tmp_path / "large").open("wb") as file:
        file.truncate(calibration.MOST_BYTES + 1)
    for source, words in (
        (str(tmp_path), "is a folder"),
        ("", "an empty path is a folder"),
        (str(tmp_path / "pipe"), "is no regular file"),
        ("/dev/zero", "is no regular file"),
        (str(tmp_path / "large"), r"has 67\.1 MB, above 67\.1 MB"),
        (str(tmp_path / "nowhere"), "cannot be read"),
        ("a\0b", "cannot be read"),
        ("~nobody-of-that-name/text", "cannot be read"),
    ):
        with pytest.raises(InvalidValue, match=words):
            prepare(options(calibration=source))


def test_a_list_with_a_nul_is_refused() -> None:
    with pytest.raises(InvalidValue, match="the list is no text: it holds a NUL"):
        prepare(options(calibration=["Some", "te\0xt"]))


def test_a_folder_to_offload_to_is_there_and_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloading, "find_library", lambda name: "libaio.so.1")
    file = write(tmp_path / "file", b"")
    for folder, words in (
        (str(tmp_path / "nowhere"), "is no folder"),
        (file, "is no folder"),
        ("a\0b", "no folder|cannot be written"),
        ("/proc", "cannot be written"),  # not even by root
    ):
        with pytest.raises(InvalidValue, match=rf"options\.offload_folder: .*({words})"):
            prepare(options(offload="nvme", offload_folder=folder))
    with pytest.raises(InvalidValue, match="offload_folder"):
        options(offload="nvme", offload_folder="")


def test_a_disk_is_not_read_without_libaio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloading, "find_library", lambda name: None)
    monkeypatch.delenv("LDFLAGS", raising=False)
    with pytest.raises(InvalidValue, match="libaio is not installed"):
        offloading.check_disk(str(tmp_path))
    monkeypatch.setenv("LDFLAGS", "-L/opt/libaio/lib")  # DeepSpeed looks there
    offloading.check_disk(str(tmp_path))
