"""load_executor: what runs for which model, what the plan says, and the errors of bad checkpoints."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from miinb import models
from miinb.config import DeploymentConfig, GenerationParams
from miinb.engine import parity
from miinb.engine.executor import Executor
from miinb.engine.finite import check_finite
from miinb.engine.loading import load_executor
from miinb.errors import BrokenCheckpoint, InvalidValue, MissingHead, ModelError, RankFailed
from miinb.messages import Phase, SequenceRequest, TokensEvent
from tests.engine.conftest import build

Tiny = Callable[[str], tuple[Any, Path]]


def stand_in_tokenizer(folder: Path) -> None:
    from miinb.engine.tokenizer_files import _stand_in

    if not (folder / "tokenizer.json").exists():
        _stand_in(101, folder)


def load(folder: Path, tmp_path: Path, **fields: Any) -> tuple[Executor, list[Phase]]:
    phases: list[Phase] = []
    config = DeploymentConfig.parse({"model": str(folder), "device": "cpu", "options": {"threads": 1}} | fields)
    state = tmp_path / "state"
    state.mkdir(exist_ok=True)
    return load_executor(config, replica=0, rank=0, gpus=None, folder=state, report=phases.append), phases


def answer(executor: Executor, prompt: list[int], new: int) -> list[int]:
    params = GenerationParams(max_new_tokens=new, ignore_eos=True, seed=0)
    executor.submit(SequenceRequest(1, prompt, params, time.monotonic()))
    tokens: list[int] = []

    def emit(event: object) -> None:
        if isinstance(event, TokensEvent):
            tokens.extend(event.token_ids)

    while executor.busy:
        executor.step(emit, lambda: None)
    return tokens


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """The folder, with other tensors, and a configuration that ties the head."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    stand_in_tokenizer(folder)
    return folder


@pytest.mark.parametrize("name", ["llama", "gpt2-untied", "gptj"])
def test_a_head_that_differs_from_the_embedding_is_not_tied(tmp_path: Path, name: str) -> None:
    """Whatever config.json says: transformers does it so."""
    build(name, tmp_path / "model", {"tie_word_embeddings": False})
    folder = edited(tmp_path / "model", lambda weights: None)
    optimized, plain = (load(folder, tmp_path, engine=engine)[0] for engine in ("optimized", "baseline"))
    assert answer(optimized, [5, 9, 33], 16) == answer(plain, [5, 9, 33], 16)


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_head_that_is_the_embedding_twice_is_kept_once(tmp_path: Path, dtype: str) -> None:
    build("llama-tied-mqa", tmp_path / "model")
    once, _ = load(edited(tmp_path / "model", lambda weights: None), tmp_path, dtype=dtype)
    wanted = answer(once, [5, 9, 33], 6)

    def twice(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    def other_name(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.embed_tokens.weight"]

    for change in (twice, other_name):
        executor, _ = load(edited(tmp_path / "model", change), tmp_path, dtype=dtype)
        assert executor.info.plan.weights_bytes == once.info.plan.weights_bytes
        assert answer(executor, [5, 9, 33], 6) == wanted


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_both_engines_give_the_same_tokens(tiny: Tiny, tmp_path: Path, name: str) -> None:
    folder = tiny(name)[1]
    stand_in_tokenizer(folder)
    fused, phases = load(folder, tmp_path)
    plain, _ = load(folder, tmp_path, engine="baseline")
    assert (fused.info.engine, plain.info.engine) == ("optimized", "baseline")
    assert {phase.name for phase in phases} == {"load", "verify"}
    assert fused.info.plan.kv_cache_bytes > 0
    assert fused.info.plan.weights_bytes == 4 * sum(p.numel() for p in tiny(name)[0].parameters())
    assert fused.info.eos_token_ids == (2,)
    assert (tmp_path / "state" / "tokenizer" / "tokenizer.json").exists()
    assert answer(fused, [5, 6, 7], 24) == answer(plain, [5, 6, 7], 24)


@pytest.mark.parametrize("engine", ["optimized", "baseline"])
def test_weights_of_nan_end_the_start_with_the_tensor_s_name(tiny: Tiny, tmp_path: Path, engine: str) -> None:
    folder = tmp_path / "nan"
    shutil.copytree(tiny("llama")[1], folder)
    stand_in_tokenizer(folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"  # in no layer that the parity check computes
    weights[name][3, 4] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BrokenCheckpoint, match=name):
        load(folder, tmp_path, engine=engine)
    executor, _ = load(folder, tmp_path, engine=engine, options={"parity": "off", "threads": 1})
    assert executor.info.engine == engine


def test_weights_beyond_the_dtype_s_range_are_told_from_broken_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    values = {"a": torch.full((3,), 3e38), "b": torch.full((3,), 1e5)}
    save_file(values, tmp_path / "model.safetensors")
    info = models.inspect(tmp_path)
    check_finite(values.values(), info, torch.float32)  # only the sum is infinite
    with pytest.raises(BrokenCheckpoint, match=r"a of .* beyond the range of float16") as caught:
        check_finite([value.half() for value in values.values()], info, torch.float16)
    assert "bf16" in caught.value.hint


def test_no_fused_form_falls_back_and_says_so(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "mish"
    build("llama", folder, changes={"hidden_act": "mish"})
    stand_in_tokenizer(folder)
    executor, _ = load(folder, tmp_path)
    assert executor.info.engine == "baseline"
    assert "mish" in executor.info.plan.warnings[0]


def test_parity_failure_falls_back_or_raises(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny("llama")[1]
    stand_in_tokenizer(folder)
    monkeypatch.setitem(parity.TOLERANCE, torch.float32, -1.0)
    executor, _ = load(folder, tmp_path)
    assert executor.info.engine == executor.info.plan.engine == "baseline"
    assert "differ from their reference" in executor.info.plan.warnings[0]
    with pytest.raises(RankFailed):
        load(folder, tmp_path, options={"parity": "raise", "threads": 1})
    executor, _ = load(folder, tmp_path, options={"parity": "off", "threads": 1})
    assert executor.info.engine == "optimized"


def test_a_check_that_finds_no_difference_says_so() -> None:
    found = parity.ParityReport(0.0, 1e-4, "nowhere", 0.1)
    assert found.passed
    assert str(found) == "no number differs from the references' (1e-04 allowed)"
    assert str(parity.ParityReport(2e-5, 1e-4, "head", 0.1)) == "largest difference 2.0e-05 of 1e-04 allowed (head)"


def test_dummy_weights_need_a_configuration_alone(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "shape"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny("qwen3")[1] / "config.json").read_bytes())
    executor, _ = load(folder, tmp_path, load_format="dummy", dtype="bf16")
    assert len(answer(executor, [5, 6, 7], 4)) == 4
    assert executor.info.dtype == "bf16"


def edit(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with other tensors."""
    target.mkdir()
    for file in folder.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    stand_in_tokenizer(target)
    return target


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return change


def test_wrong_tensors_are_named(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama")[1]
    name = "model.layers.1.self_attn.k_proj.weight"

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.zeros(25, 48)

    with pytest.raises(BrokenCheckpoint, match=rf"{name}.*\[25, 48\].*\[24, 48\]"):
        load(edit(folder, tmp_path / "a", grow), tmp_path)
    whole = edit(folder, tmp_path / "w", lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(BrokenCheckpoint, match=rf"{name}.*holds whole numbers \(I8\)"):
        load(whole, tmp_path)
    with pytest.raises(BrokenCheckpoint, match=r"layers\.1\.self_attn\.k_proj\.weight"):
        load(edit(folder, tmp_path / "b", without(name)), tmp_path)
    with pytest.raises(MissingHead):
        load(edit(folder, tmp_path / "c", without("lm_head.weight")), tmp_path)
    unknown = edit(folder, tmp_path / "d", lambda tensors: tensors.update({"model.extra.weight": torch.zeros(2)}))
    executor, _ = load(unknown, tmp_path)
    assert "extra.weight" in executor.info.plan.warnings[0]


def test_options_that_cannot_be_had_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama")[1]
    stand_in_tokenizer(folder)
    for fields in ({"dtype": "fp8"}, {"max_length": 4096}):
        with pytest.raises(InvalidValue, match=next(iter(fields))):
            load(folder, tmp_path, **fields)
    if not torch.cuda.is_available():
        with pytest.raises(InvalidValue, match="no GPU"):
            load(folder, tmp_path, device="cuda")
    with pytest.raises(ModelError, match="tokenizer"):
        load(edit_without_tokenizer(folder, tmp_path / "mute"), tmp_path)


def edit_without_tokenizer(folder: Path, target: Path) -> Path:
    edit(folder, target, lambda tensors: None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).unlink(missing_ok=True)
    return target


def test_chat_template_comes_from_where_versions_keep_it(tiny: Tiny, tmp_path: Path) -> None:
    folder = edit(tiny("llama")[1], tmp_path / "chatty", lambda tensors: None)
    named = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    load(folder, tmp_path)
    assert (tmp_path / "state" / "tokenizer" / "chat_template.jinja").read_text() == "D"


def test_answers_in_bf16_do_not_depend_on_the_batch(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama")[1]
    stand_in_tokenizer(folder)
    executor, _ = load(folder, tmp_path, dtype="bf16", max_batch=8)
    if not any("every step" in line.reason for line in executor.info.plan.lines):
        pytest.skip("PyTorch's linear layers, which this CPU makes the faster ones, differ by batch size")
    prompts = [[5 + i] * (1 + 7 * i) for i in range(8)]
    alone = [answer(executor, prompt, 20) for prompt in prompts]
    params = GenerationParams(max_new_tokens=20, ignore_eos=True, seed=0)
    for row_id, prompt in enumerate(prompts):
        executor.submit(SequenceRequest(row_id, prompt, params, time.monotonic()))
    together: list[list[int]] = [[] for _ in prompts]
    while executor.busy:
        executor.step(
            lambda event: together[event.row_id].extend(event.token_ids) if isinstance(event, TokensEvent) else None,
            lambda: None,
        )
    assert together == alone
