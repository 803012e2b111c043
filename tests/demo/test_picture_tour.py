"""`miinb demo --images` from the first line to the last process, and that the pictures show what their prompts say."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import miinb
from miinb.demo import main, picture_tour, tiny_images
from miinb.demo.judging import GUIDANCE, SEEDS, STEPS, is_right, judge
from miinb.demo.shapes import prompts
from tests.tiny_pipeline import make_pipeline


def test_it_is_small_and_names_its_origin() -> None:
    folder = tiny_images()
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 15_000_000
    facts = json.loads((folder / "provenance.json").read_text())
    assert facts["license"] == "MIT"
    assert {"seed", "trained", "torch", "diffusers", "hardware", "date"} <= set(facts)
    assert facts["judged_at"] == {"steps": STEPS, "guidance": GUIDANCE}
    assert [(one["prompt"], one["seed"]) for one in facts["judgments"]] == list(itertools.product(prompts(), SEEDS))
    assert facts["right"] >= 22


def tour(folder: Path, *options: str) -> tuple[str, list[Path]]:
    """What the demonstration says, and the files that it leaves."""
    command = [sys.executable, "-u", "-m", "miinb.demo", "--images", *options]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        out, err = demo.communicate(timeout=280)
    assert demo.returncode == 0, err
    assert not miinb.deployments()
    files = sorted((folder / picture_tour.FOLDER).iterdir())
    assert all(str(file) in out for file in files)
    return out, files


@pytest.mark.usefixtures("_own_state")
def test_it_serves_a_model_of_yours(tmp_path: Path) -> None:
    make_pipeline(tmp_path)
    out, files = tour(tmp_path, "--model", str(tmp_path / "model"), "--prompt", "a red fox")
    assert "a red fox: " in out
    assert "s a picture" in out
    assert [file.name for file in files] == ["1.png", "2.png"]
    with Image.open(files[1]) as picture:
        made = json.loads(picture.info["miinb"])
    assert (made["prompt"], made["seed"], made["num_inference_steps"]) == ("a red fox", 2, STEPS)
    assert picture_tour.KNOWN not in out
    assert "3. The same model in plain diffusers (the baseline)" in out
    assert re.search(r"a picture: [0-9.]+ s by diffusers, [0-9.]+ s optimized: [0-9.]+x as fast", out)
    assert (tmp_path / picture_tour.CHART).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.usefixtures("_own_state")
def test_its_pictures_show_what_their_prompts_say(tmp_path: Path) -> None:
    out, files = tour(tmp_path)
    assert len(files) == 2 * len(picture_tour.PROMPTS)
    assert all(f"{prompt}: " in out for prompt in picture_tour.PROMPTS)
    assert [file.name for file in files] == [f"{seed}.png" for seed in range(1, 9)]
    right = 0
    for file in files:
        with Image.open(file) as picture:
            right += is_right(json.loads(picture.info["miinb"])["prompt"], judge(picture))
    assert right >= len(files) - 1
    assert picture_tour.KNOWN in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--images", "-n", "8"], "--max-new-tokens"),
        (["--images", "--price", "1"], "--price"),
        (["--images", "--notebook", "--model", "x"], "--model"),
        (["--images", "--tiny", "--model", "x"], "not together"),
        (["--images", "--out", "no/such/folder"], "no/such/folder"),
        (["--images", "--model", "./no-such-model"], "no-such-model"),
    ],
)
def test_what_cannot_be_done_is_one_line(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options) == 1
    assert says in capsys.readouterr().err
