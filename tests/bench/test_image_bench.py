"""The comparison of pictures, with a tiny model on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

import miinb
from miinb import models
from miinb.bench import images


def test_both_arms_make_the_same_pictures_and_the_run_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--tiny", "--device", "cpu", "--dtype", "fp32", "--size", "64", "--steps", "2"]
    images.main([*small, "--batches", "1", "2", "--repeat", "1", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [[arm, n] for arm in ("diffusers", "optimized") for n in "12"]
    assert "tiny model, 64 x 64, 2 steps, fp32" in lines[5]
    runs = miinb.load_runs(tmp_path)
    (env,) = runs.env.values()
    for batch in (1, 2):
        assert env["arms"]["optimized"][f"finite_{batch}"]
        assert 0 < env["arms"]["optimized"][f"difference_{batch}"] < 1e-4
    rows = runs.requests
    assert len(rows) == 8
    assert rows["warmup"].sum() == 4
    assert (rows["images"] == rows["batch_size"]).all()
    assert ((rows["model_s"] + rows["postprocess_s"] - rows["e2e_s"]).abs() < 1e-9).all()
    assert set(runs.summary["arm"]) == {"diffusers", "optimized"}


@pytest.mark.parametrize("wrong", [["--size", "60"], ["--steps", "0"], ["--guidance", "1"], ["--batches", "0"]])
def test_what_cannot_be_measured_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        images.main(["--tiny", *wrong])
    assert wrong[0] in capsys.readouterr().err


def test_a_folder_of_configurations_is_a_model(tmp_path: Path) -> None:
    images.main(["--folder", str(tmp_path)])
    info = models.inspect(tmp_path, load_format="dummy")
    assert (info.parameters, info.optimized) == (1_066_235_307, True)
    assert info.pipeline is not None
    assert (info.pipeline.width, info.pipeline.text_length) == (512, 77)


@pytest.mark.slow
def test_the_profile_names_operators(capsys: pytest.CaptureFixture[str]) -> None:
    images.main(["--tiny", "--device", "cpu", "--dtype", "fp32", "--size", "64", "--profile", "--attention", "cudnn"])
    assert "convolution" in capsys.readouterr().out
