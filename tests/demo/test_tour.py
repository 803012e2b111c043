"""`miinb demo` from the first line to the last process, and when it is stopped halfway."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import miinb
from miinb.demo import main, tour


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", "-m", "miinb.demo", "--tiny", *options]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.usefixtures("_own_state")
def test_it_serves_answers_measures_and_ends(tmp_path: Path) -> None:
    with start(tmp_path, "-n", "24", "--price", "0.5") as demo:
        out, err = demo.communicate(timeout=280)
    assert demo.returncode == 0, err
    assert "Once upon a time, there was a" in out
    assert "[24 tokens, the first after" in out
    assert "baseline" in out
    assert "optimized" in out
    assert (tmp_path / "miinb-demo.png").read_bytes()[:4] == b"\x89PNG"
    assert not miinb.deployments()


@pytest.mark.usefixtures("_own_state")
def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    with start(tmp_path, "-n", "400") as demo:
        assert demo.stdout is not None
        while "2. An answer" not in (line := demo.stdout.readline()):
            assert line, "it ended before the answer"
        demo.send_signal(signal.SIGINT)
        _, err = demo.communicate(timeout=60)
    assert demo.returncode == tour.INTERRUPTED
    assert "Stopped" in err
    assert "Traceback" not in err
    assert not miinb.deployments()


def test_the_notebook_option_starts_jupyterlab_beside_the_first_notebook(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "miinb.demo", "--tiny", "--notebook"]
    clean = {**os.environ, "BROWSER": "true", "JUPYTER_CONFIG_DIR": str(tmp_path), "JUPYTER_DATA_DIR": str(tmp_path)}
    with subprocess.Popen(command, env=clean, stderr=subprocess.PIPE, text=True, start_new_session=True) as demo:
        assert demo.stderr is not None
        serving = f"Serving notebooks from local directory: {tour.writable_notebook().parent}"
        while serving not in (line := demo.stderr.readline()):
            assert line, "it ended before it served the notebook"
        os.killpg(demo.pid, signal.SIGTERM)  # a terminal's Ctrl-C asks first
        demo.communicate(timeout=30)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tiny", "--model", "x"], "not together"),
        (["--tiny", "--out", "no/such/folder"], "no/such/folder"),
        (["--model", "./no-such-model"], "no-such-model"),
        (["--tiny", "-n", "0"], "max_new_tokens"),
    ],
)
def test_what_cannot_be_done_is_one_line(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options) == 1
    assert says in capsys.readouterr().err


def test_the_notebook_is_copied_out_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    installed = tmp_path / "site" / "notebooks"
    installed.mkdir(parents=True)
    for notebook in tour.NOTEBOOKS.glob("*.ipynb"):
        (installed / notebook.name).write_bytes(notebook.read_bytes())
    monkeypatch.setattr(tour, "NOTEBOOKS", installed)
    mine = tour.writable_notebook()
    assert mine == tmp_path / "miinb-notebooks" / tour.NOTEBOOK
    mine.write_text("changed")
    assert tour.writable_notebook().read_text() == "changed"  # a copy that the user changed stays


def test_the_checkout_opens_its_own_notebook() -> None:
    assert tour.writable_notebook() == Path(__file__).parents[2] / "notebooks" / tour.NOTEBOOK


def test_pictures_have_a_notebook_of_their_own() -> None:
    assert tour.writable_notebook(tour.IMAGE_NOTEBOOK).is_file()


@pytest.mark.parametrize(("option", "value", "words"), [("--price", "-1", "price"), ("--prompt", "", "--prompt")])
def test_what_cannot_be_is_told_before_a_model_starts(
    option: str, value: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--tiny", option, value]) == 1
    shown = capsys.readouterr()
    assert words in shown.err
    assert not shown.out
