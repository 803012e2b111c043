"""`check`: the optimized engine beside transformers, in its own process, and its verdicts."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from miinb import checking, cli
from miinb.checking import Comparison, check
from miinb.demo import tiny_model
from miinb.errors import UnsupportedModel

GOOD = Comparison(
    model="m", device="d", dtype="fp32", baseline_dtype="fp32", layers=((1e-6, 0.0),), logits=(1e-6, 0.0),
    tokens=(1, 2), expected_tokens=(1, 2), prompt_tokens=4,
)  # fmt: skip
BF16 = {"dtype": "bf16", "baseline_dtype": "bf16"}


@pytest.mark.parametrize(
    ("changes", "passed", "words"),
    [
        ({}, True, "all 2 greedy tokens equal"),
        ({"logits": (2e-4, 0.0)}, False, "2.0e-04 (1.0e-04 allowed)"),
        ({"tokens": (1, 3)}, False, "differ from number 2 of 2 on"),
        ({"tokens": (), "expected_tokens": ()}, True, "passed: error of the outputs 1.0e-06 (1.0e-04 allowed)"),
        (BF16 | {"logits": (0.014, 0.01), "tokens": (1, 3)}, True, "1.5e-02 allowed"),
        (BF16 | {"logits": (0.016, 0.01)}, False, "failed"),
        ({"dtype": "int8", "logits": (0.1, 0.0)}, True, "no limit is stated"),
        ({"kv_dtype": "fp8", "logits": (0.05, 0.0), "tokens": (1, 3)}, True, "1.0e-01 allowed"),
        (BF16 | {"kv_dtype": "fp8", "logits": (0.13, 0.01)}, False, "1.3e-01 (1.2e-01 allowed)"),
        ({"dtype": "int8", "logits": (float("inf"), 0.0)}, False, "failed"),
    ],
)
def test_verdicts(changes: dict[str, object], passed: bool, words: str) -> None:
    found = dataclasses.replace(GOOD, **changes)  # type: ignore[arg-type]
    assert found.passed is passed
    assert words in found.verdict


def test_the_tiny_model_passes_once_computed_and_once_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = str(tiny_model())
    first = check(model, dtype="bf16", device="cpu")
    assert first.passed, first.verdict
    assert not first.cached
    assert first.baseline_dtype == "bf16"
    assert len(first.tokens) == len(first.expected_tokens) == 16
    monkeypatch.setattr(checking, "_run", None)
    assert check(model, dtype="bf16", device="cpu") == dataclasses.replace(first, cached=True)
    assert cli.main(["check", model, "--dtype", "bf16", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "layer 0" in shown
    assert "passed: error of the logits" in shown


def test_an_fp8_cache_has_a_bound_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = check(tiny_model(), dtype="fp32", kv_dtype="fp8", device="cpu")
    assert found.passed, found.verdict
    assert found.logits[0] > 1e-4
    assert found.measure.startswith("root mean square")


def test_another_answer_is_an_error_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checking, "check", lambda *_, **__: dataclasses.replace(GOOD, logits=(0.5, 0.0)))
    assert cli.main(["check", "m"]) == 1
    shown = capsys.readouterr()
    assert "layer 0" in shown.out
    assert "failed: error of the logits 5.0e-01" in shown.err


def test_what_cannot_be_checked_says_why(tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(tiny_model(), odd)
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"model_type": "mpt"}))
    with pytest.raises(UnsupportedModel, match="no policy for mpt"):
        check(odd)
