"""The comparison of pictures, with a tiny model on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

import miinb
from miinb import models
from miinb.bench import image_folder, images


def test_both_arms_make_the_same_pictures_and_the_run_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--tiny", "--device", "cpu", "--dtype", "fp32", "--size", "64", "--steps", "2"]
    images.main([*small, "--batches", "1", "2", "--repeat", "1", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [[arm, n] for arm in ("baseline", "optimized") for n in "12"]
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
    assert ((rows["steps_s"] + rows["vae_s"] - rows["e2e_s"]).abs() < 1e-9).all()
    assert set(runs.summary["arm"]) == {"baseline", "optimized"}
    assert runs.summary["psnr_db"].iloc[2:].min() > 50
    assert len(env["pictures"]) == 4
    assert (tmp_path / "in-process-images.png").is_file()


def test_what_is_lossy_is_compared_with_the_exact_arm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--tiny", "--device", "cpu", "--dtype", "fp32", "--size", "64", "--steps", "6", "--batches", "1"]
    images.main([*small, "--repeat", "1", "--lossy", "step_reuse=3", "int8", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "Latents and PSNR of step_reuse=3 are to those of optimized." in shown
    runs = miinb.load_runs(tmp_path)
    (env,) = runs.env.values()
    summary = runs.summary.set_index("arm")
    assert list(summary.index) == ["baseline", "optimized", "step_reuse=3", "int8"]
    assert list(summary["dtype"]) == ["fp32", "fp32", "fp32", "int8"]
    exact = summary["psnr_db"]["optimized"]
    for name in ("step_reuse=3", "int8"):
        assert 20 < summary["psnr_db"][name] < min(exact, 80)
        assert env["arms"][name]["difference_1"] > 10 * env["arms"]["optimized"]["difference_1"]
        assert env["arms"][name]["compared_with"] == "optimized"


@pytest.mark.slow
def test_the_share_of_the_server_and_the_starts_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--tiny", "--quick", "--device", "cpu", "--dtype", "fp32", "--batches", "1", "2", "--steps", "2"]
    images.main([*small, "--served", "--lossy", "step_reuse=2", "int8", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "ready s" in shown
    assert "overhead" in shown
    runs = miinb.load_runs(tmp_path)
    (env,) = (env for env in runs.env.values() if env["name"] == "images-served")
    assert all(env["arms"][arm]["phases_s"]["load"] > 0 for arm in ("baseline", "optimized", "int8"))
    served = runs.select("images-served").summary
    assert served["overhead"].between(0, 10).all()
    assert served["psnr_db"][served["arm"] == "optimized"].min() > 50
    assert served["psnr_db"][served["arm"].isin(["step_reuse=2", "int8"])].between(20, 80).all()
    assert (tmp_path / "served-images.png").is_file()


def test_a_made_up_vocabulary_is_of_the_size_and_reads_all_text() -> None:
    words = image_folder.tokenizer(1000)
    assert len(words) == 1000
    found = words("a red Fox, 42 ½")
    assert found["input_ids"][0] == words.bos_token_id
    assert words.unk_token_id not in found["input_ids"][1:-1]


@pytest.mark.parametrize(
    "wrong",
    [
        *(["--size", "60"], ["--steps", "0"], ["--guidance", "1"], ["--batches", "0"], ["--profile", "--served"]),
        *(["--lossy", "int4"], ["--lossy", "step_reuse=1"], ["--lossy", "int8", "int8"]),
        ["--profile", "--lossy", "int8"],
    ],
)
def test_what_cannot_be_measured_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        images.main(["--tiny", *wrong])
    assert wrong[0] in capsys.readouterr().err


def test_a_folder_of_configurations_is_a_model(tmp_path: Path) -> None:
    image_folder.main([str(tmp_path)])
    info = models.inspect(tmp_path, load_format="dummy")
    assert (info.parameters, info.optimized) == (1_066_235_307, True)
    assert info.pipeline is not None
    assert (info.pipeline.width, info.pipeline.text_length) == (512, 77)


@pytest.mark.slow
def test_the_profile_names_operators(capsys: pytest.CaptureFixture[str]) -> None:
    images.main(["--tiny", "--device", "cpu", "--dtype", "fp32", "--size", "64", "--profile", "--attention", "cudnn"])
    assert "convolution" in capsys.readouterr().out
