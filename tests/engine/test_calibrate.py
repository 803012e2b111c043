"""int4 fitted to a text: the rounding of a matrix, the way through the layers, and what the option takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from miinb import models
from miinb.config import DeploymentConfig
from miinb.demo import fetch
from miinb.engine import calibrate
from miinb.engine.calibrate import (
    calibration_line,
    calibration_of,
    calibration_text,
    calibration_tokens,
    with_calibration,
)
from miinb.engine.decoder import Decoder
from miinb.engine.gptq import round_by_inputs
from miinb.engine.kv_cache import CacheSize, KVCache
from miinb.engine.perplexity import perplexity
from miinb.engine.place import Place
from miinb.engine.quantize import Account, Quantizer
from miinb.engine.step_batch import StepBatch, StepRow
from miinb.engine.weights import tensors
from miinb.errors import InvalidValue, OutOfMemory
from miinb.kernels.formats import dequantize
from miinb.messages import Plan
from tests.engine.conftest import real_text
from tests.engine.test_loading import answer, load, stand_in_tokenizer
from tests.engine.test_quantize import decoder

Tiny = Callable[[str], tuple[Any, Path]]
CPU = Place(torch.device("cpu"), "int4")


def inputs(count: int, columns: int) -> Tensor:
    """Inputs that go along with each other, some of them much larger than others."""
    generator = torch.Generator().manual_seed(columns)
    mixed = torch.randn(count, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return (mixed + 3 * torch.randn(count, 1, generator=generator)) * torch.logspace(-1, 1, columns)


def nearest(weight: Tensor) -> Tensor:
    quantizer = Quantizer("int4")
    words, scale = quantizer.empty(*weight.shape, weight.device)
    quantizer.quantize(weight, words, scale)
    return dequantize(words, scale)[:, : weight.shape[1]]


def fitted(weight: Tensor, x: Tensor, drift: Tensor | None = None) -> Tensor:
    drift = torch.zeros(x.shape[1], x.shape[1]) if drift is None else drift
    account = Account()
    words, scale = round_by_inputs(weight, x.t() @ x, drift, account)
    back = dequantize(words, scale)[:, : weight.shape[1]]
    assert account.rounding == pytest.approx(float((back - weight).norm() / weight.norm()), rel=1e-3)
    return back


@pytest.mark.parametrize("columns", [48, 64, 200, 300])
def test_products_change_less_than_by_rounding_to_the_nearest(columns: int) -> None:
    x, weight = inputs(2000, columns), torch.randn(30, columns, generator=torch.Generator().manual_seed(1))
    lost = [float((x @ (back - weight).t()).norm()) for back in (fitted(weight, x), nearest(weight))]
    assert lost[0] < 0.7 * lost[1]


def test_what_inputs_have_drifted_by_is_made_up_for() -> None:
    right, weight = inputs(2000, 128), torch.randn(30, 128, generator=torch.Generator().manual_seed(1))
    x = right @ (torch.eye(128) + 0.05 * torch.randn(128, 128, generator=torch.Generator().manual_seed(2)))
    wanted = right @ weight.t()
    backs = (fitted(weight, x, (right - x).t() @ x), fitted(weight, x), nearest(weight))
    lost = [float((x @ back.t() - wanted).norm()) for back in backs]
    assert lost[0] < 0.6 * min(lost[1:]), "a half of it"


def test_columns_without_inputs_and_few_inputs() -> None:
    x, weight = inputs(20, 128), torch.randn(30, 128, generator=torch.Generator().manual_seed(1))
    x[:, 5:9] = 0
    back = fitted(weight, x)
    assert back.isfinite().all()
    assert (back - weight).norm() < 0.5 * weight.norm()
    assert fitted(weight, torch.zeros(3, 128)).isfinite().all()


@pytest.mark.parametrize("name", ["llama", "llama-tied-mqa", "gpt2", "gptj", "opt-350m", "bloom", "gemma2", "phi3"])
def test_every_family_is_fitted(tiny: Tiny, name: str) -> None:
    folder = tiny(name)[1]
    ids = torch.randint(3, 98, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    exact, plain, ours = decoder(folder, "fp32"), decoder(folder, "int4"), decoder(folder, "int4", calibration=ids)
    assert ours.weights.fitted_tokens >= 500
    assert {t.dtype for t in tensors(ours.weights.layers[-1]) if t.dim() == 2} == {torch.int32}
    assert ours.weights.rounding > plain.weights.rounding, "the numbers change more, the products less"
    wanted, rounded, found = (states(each, ids[:100]) for each in (exact, plain, ours))
    assert (found - wanted).norm() < 0.8 * (rounded - wanted).norm()


def states(model: Decoder, ids: list[int]) -> Tensor:
    """What the layers make of a text, before the head."""
    cache = KVCache(model.spec, CacheSize(1, 100, 100, 1, 0), torch.float32, torch.device("cpu"))
    x, residual = model.body(StepBatch.of_rows([StepRow(ids, 0, [0])], 100), cache)
    return x if residual is None else x + residual


def test_the_text_is_the_samples_a_files_or_that_of_a_list(tmp_path: Path) -> None:
    assert len(calibration_text("auto")) > 50_000
    (tmp_path / "text.txt").write_text("Some text.", encoding="utf-8")
    assert calibration_text(str(tmp_path / "text.txt")) == "Some text."
    assert calibration_text(["One.", "Two."]) == "One.\n\nTwo."
    with pytest.raises(InvalidValue, match=r"options\.calibration: .*nowhere\.txt cannot be read"):
        calibration_text(str(tmp_path / "nowhere.txt"))


def test_a_deployment_says_what_it_was_fitted_to(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama")[1]
    stand_in_tokenizer(folder)

    def line(**fields: Any) -> str:
        executor, _ = load(folder, tmp_path, dtype="int4", **fields)
        assert len(answer(executor, [5, 6, 7], 5)) == 5
        return next(f"{one.choice}: {one.reason}" for one in executor.info.plan.lines if one.what == "calibration")

    assert line(options={"calibration": "off"}).startswith("off: asked for")
    assert line(load_format="dummy").startswith("off: random weights")
    given = line(options={"calibration": ["word " * 2000]})
    assert "of the text that was given" in given
    assert int(given.split()[0].replace(",", "")) >= 128


def test_a_short_text_is_warned_of(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama")[1]
    stand_in_tokenizer(folder)
    executor, _ = load(folder, tmp_path, dtype="int4", options={"calibration": ["a word"]})
    plan = executor.info.plan
    said = next(one for one in plan.lines if one.what == "calibration")
    assert 0 < int(said.choice.split()[0]) < calibrate.FEW_TOKENS
    assert said.reason.startswith("the calibration text is too short: with fewer than 128 tokens")
    assert said.reason in plan.warnings

    config = DeploymentConfig.parse({"model": "m", "dtype": "int4", "options": {"calibration": ["a word"]}})
    plan = with_calibration(Plan("optimized", "cpu", "int4"), config, models.inspect(folder), CPU, 0)
    assert plan.lines[-1].reason.startswith("the calibration text has no token of this model")
    assert plan.warnings == (plan.lines[-1].reason,)
    assert with_calibration(Plan("optimized", "cpu", "int4"), config, models.inspect(folder), CPU, 128).warnings == ()


def test_a_cpu_does_not_fit_a_large_model_unasked(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "free_bytes", lambda device, config: 100 << 30)
    folder = tiny("llama")[1]
    stand_in_tokenizer(folder)
    model = dataclasses.replace(models.inspect(folder), parameters=1_000_000_000)
    config = DeploymentConfig.parse({"model": str(folder), "dtype": "int4"})
    place = Place(torch.device("cpu"), "int4")
    assert calibration_of(config, model, place) == []
    assert "take a CPU long" in calibration_line(config, model, place, 0)[2]
    asked = DeploymentConfig.parse({"model": str(folder), "dtype": "int4", "options": {"calibration": ["a word"]}})
    assert calibration_of(asked, model, place)
    assert calibration_of(config, model, Place(torch.device("cuda"), "int4"))
    assert calibration_of(config, model, Place(torch.device("cuda"), "int8")) == []


def test_a_model_is_not_fitted_without_the_memory_for_it(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama")[1]
    stand_in_tokenizer(folder)
    model, place = models.inspect(folder), Place(torch.device("cpu"), "int4")
    need = calibrate.working_bytes(model, place)
    assert need > 5 * 4 * 64**2
    assert calibrate.working_bytes(dataclasses.replace(model, spec=None), place) == 0

    def config(text: Any, limit: int) -> DeploymentConfig:
        options = {"calibration": text, "memory_limit_bytes": limit}
        return DeploymentConfig.parse({"model": str(folder), "dtype": "int4", "options": options})

    enough = need + model.weights_bytes("int4")
    assert calibration_of(config("auto", enough), model, place)
    assert calibration_of(config("auto", enough - 1), model, place) == []
    assert "of memory besides the weights" in calibration_line(config("auto", enough - 1), model, place, 0)[2]
    with pytest.raises(OutOfMemory, match=r"options\.calibration: it would take about .*calibration='off'"):
        calibration_of(config(["a word"], enough - 1), model, place)


@pytest.mark.slow
@pytest.mark.models
def test_perplexity_of_a_real_model() -> None:
    """SmolLM2 on another part of Python's documentation than it was fitted to."""
    folder = fetch.smollm2(quiet=True)
    ids = real_text(folder)
    exact = decoder(folder, "fp32")
    fitted_to = calibration_tokens(models.inspect(folder), "auto")
    ours, plain = decoder(folder, "int4", calibration=fitted_to), decoder(folder, "int4")
    before, lost, nearest_lost = (perplexity(each, ids) for each in (exact, ours, plain))
    assert lost < 1.03 * before
    assert nearest_lost > 1.2 * before
