"""What encoder checkpoints hold and lack: names of all times, other heads, broken ones; and a start from a folder."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from miinb import encoder_planner, models
from miinb.config import DeploymentConfig
from miinb.engine import encoder_parity, encoder_weights, loading
from miinb.engine.encoder import Encoder, EncoderBatch
from miinb.engine.encoder_kernels import encoder_kernels
from miinb.engine.encoder_weights import load_encoder_weights
from miinb.engine.executor import Executor
from miinb.engine.labels import function_of, labels_of
from miinb.engine.parameters import TILE_OUTPUTS, quantized_encoder_bytes
from miinb.engine.parity import ParityReport
from miinb.engine.place import Place
from miinb.engine.policies import ENCODERS
from miinb.engine.weights import tensors, weights_bytes
from miinb.errors import BrokenCheckpoint, MissingHead, RankFailed, UnsupportedModel
from miinb.kernels.cpu_blocks import BlockedLinear
from miinb.kernels.formats import FP8
from miinb.messages import EncodedEvent, EncodeRequest, Plan
from tests.engine.tiny_encoders import CONFIGS, HEADS, build
from tests.tiny_tokenizers import byte_level

CPU = torch.device("cpu")
Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for task, name in (("fill-mask", "bert"), ("text-classification", "bert"), ("feature-extraction", "bert")):
        made[task] = tmp_path_factory.mktemp(task)
        build(name, task, made[task])
    return made


def edit(folder: Path, target: Path, change: Change) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def load(folder: Path, task: str, dtype: str = "fp32") -> Encoder:
    info = models.inspect(folder).serving(task)
    assert info.encoder is not None
    return Encoder(info.encoder, load_encoder_weights(info, ENCODERS["bert"], info.encoder, dtype=dtype, device=CPU))


def outputs(folder: Path, task: str) -> Tensor:
    return load(folder, task).outputs(EncoderBatch.of_sequences([[3, 9, 27, 81], [5]]))


def rename(tensors: dict[str, Tensor]) -> None:
    """Names of 2018, with a head of the time, and buffers of 2020."""
    for name in list(tensors):
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        tensors[old] = tensors.pop(name)
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors["cls.predictions.decoder.bias"] = torch.zeros(101)  # cls.predictions.bias counts
    tensors["cls.seq_relationship.weight"] = torch.zeros(2, 40)
    tensors["bert.embeddings.position_ids"] = torch.zeros(1, 48, dtype=torch.int64)
    tensors["bert.pooler.dense.weight"] = torch.zeros(40, 40)


def moved(tensors: dict[str, Tensor]) -> None:
    tensors["cls.predictions.decoder.bias"] = tensors.pop("cls.predictions.bias")


@pytest.mark.parametrize("change", [rename, moved])
def test_names_of_all_times(folders: dict[str, Path], tmp_path: Path, change: Change) -> None:
    folder = folders["fill-mask"]
    assert torch.equal(outputs(edit(folder, tmp_path / "old", change), "fill-mask"), outputs(folder, "fill-mask"))


def test_a_decoder_that_differs_from_the_embedding_is_not_tied(folders: dict[str, Path], tmp_path: Path) -> None:
    def untie(tensors: dict[str, Tensor]) -> None:
        tensors["cls.predictions.decoder.weight"] = -tensors["bert.embeddings.word_embeddings.weight"]

    folder = folders["fill-mask"]
    bias = load_file(folder / "model.safetensors")["cls.predictions.bias"]
    theirs, ours = outputs(folder, "fill-mask") - bias, outputs(edit(folder, tmp_path / "untied", untie), "fill-mask")
    assert torch.allclose(ours - bias, -theirs, atol=1e-5)


def test_a_head_that_the_task_does_not_need_is_not_read(folders: dict[str, Path]) -> None:
    encoder = load(folders["text-classification"], "feature-extraction")
    assert encoder.weights.unread == ("classifier",)
    assert encoder.outputs(EncoderBatch.of_sequences([[1, 2]])).shape == (2, 40)
    assert "cls.predictions.decoder" not in load(folders["fill-mask"], "fill-mask").weights.unread


def test_a_head_whose_weights_are_missing(folders: dict[str, Path]) -> None:
    base = models.inspect(folders["feature-extraction"])
    with pytest.raises(MissingHead, match=r"fill-mask: cls\.predictions\.transform\.dense\.weight and 4") as e:
        base.serving(base.task("fill-mask"))
    assert e.value.hint == "It serves feature-extraction; use a model trained for fill-mask."
    classifier = models.inspect(folders["text-classification"])
    tokens = classifier.serving("token-classification")
    assert tokens.encoder is not None, "the same tensors make one"
    choice = Plan("optimized", "cpu", "fp32")
    assert (
        "was this head trained for token-classification"
        in encoder_planner.head(choice, tokens, "token-classification").warnings[0]
    )
    assert not encoder_planner.head(choice, classifier, "text-classification").warnings
    with pytest.raises(MissingHead, match=r"qa_outputs"):
        classifier.serving("question-answering")
    with pytest.raises(UnsupportedModel, match="does not serve text-generation"):
        base.task("text-generation")


def test_tensors_that_nobody_knows_or_that_do_not_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    folder, name = folders["text-classification"], "bert.encoder.layer.1.output.dense.weight"
    for place, change, error, words in (
        ("unknown", lambda t: t.update({"bert.adapter.weight": torch.zeros(2)}), UnsupportedModel, r"adapter\.weight"),
        ("missing", lambda t: t.pop(name), BrokenCheckpoint, "lacks the tensor encoder.layer.1.output.dense.weight"),
        ("shape", lambda t: t.update({name: torch.zeros(40, 71)}), BrokenCheckpoint, r"\[40, 71\].*\[40, 72\]"),
        ("whole", lambda t: t.update({name: t[name].to(torch.int8)}), BrokenCheckpoint, "whole numbers"),
    ):
        with pytest.raises(error, match=words):
            load(edit(folder, tmp_path / place, change), "text-classification")


def test_half_a_head_is_damage(folders: dict[str, Path], tmp_path: Path) -> None:
    half = edit(folders["text-classification"], tmp_path / "half", lambda tensors: tensors.pop("classifier.bias"))
    with pytest.raises(MissingHead, match=r"only a part of the head .*: classifier\.bias is missing") as caught:
        models.inspect(half).serving("text-classification")
    assert "damaged" in caught.value.hint


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_are_known_before_a_start(tmp_path: Path, name: str, task: str) -> None:
    build(name, task, tmp_path)
    info = models.inspect(tmp_path)
    assert info.encoder is not None
    assert info.kv_bytes_per_token() == 0
    policy = ENCODERS[info.family]
    for dtype in ("fp32", "bf16"):
        for dummy in (False, True):
            weights = load_encoder_weights(info, policy, info.encoder, dtype=dtype, device=CPU, dummy=dummy)
            assert info.weights_bytes(dtype) == weights_bytes(weights)
    kernels, _ = encoder_kernels(Plan("optimized", "cpu", "int8"), Place(CPU, "int8"))
    tiles = {"levels": kernels.levels, "pack": kernels.pack}
    weights = load_encoder_weights(info, policy, info.encoder, dtype="int8", device=CPU, **tiles)
    assert info.weights_bytes("int8") == quantized_encoder_bytes(info.encoder, "int8")
    layer = weights.layers[0].up
    tile = layer.tile if isinstance(layer, BlockedLinear) else TILE_OUTPUTS  # this CPU's: tiny matrices fill few
    assert quantized_encoder_bytes(info.encoder, "int8", tile) == pytest.approx(weights_bytes(weights), rel=0.05)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_quantized_as_on_a_gpu(tmp_path: Path, name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its form of the numbers, though the tensors are on a CPU, by the reference."""
    build(name, "fill-mask", tmp_path)
    info = models.inspect(tmp_path).serving("fill-mask")
    policy, spec = ENCODERS[info.family], info.encoder
    assert spec is not None
    exact = Encoder(spec, load_encoder_weights(info, policy, spec, dtype="fp32", device=CPU))
    made = encoder_weights.quantizers
    monkeypatch.setattr(
        encoder_weights, "quantizers", lambda dtype, _, levels: made(dtype, torch.device("cuda"), levels)
    )
    ours = Encoder(spec, load_encoder_weights(info, policy, spec, dtype=dtype, device=CPU))
    layer = ours.weights.layers[0].up
    assert layer.weight.dtype == (torch.int32 if dtype == "int8" else FP8)
    assert ours.weights.head[-1].linear.weight.dtype == torch.int32, "a head over the vocabulary is int8"
    assert 0 < ours.weights.rounding < (0.02 if dtype == "int8" else 0.03)
    batch = EncoderBatch.of_sequences([[5, 6, 7, 8], [9, 10]])
    wanted = exact.outputs(batch)
    assert (ours.outputs(batch) - wanted).norm() < (0.05 if dtype == "int8" else 0.15) * wanted.norm()
    found = list(tensors(ours.weights))
    wide = sum(tensor.nbytes for tensor in found if tensor.dtype == torch.float32)
    wide -= sum(4 * len(tensor) for tensor in found if tensor.dtype == FP8)  # scales have four bytes there too
    assert info.weights_bytes(dtype, on_gpu=True) == weights_bytes(ours.weights) - wide // 2


@pytest.fixture
def start(folders: dict[str, Path], tmp_path: Path) -> Callable[..., Executor]:

    def run(change: Change = lambda tensors: None, **fields: Any) -> Executor:
        folder = edit(folders["text-classification"], tmp_path / "model", change)
        byte_level(folder)
        values = {"model": str(folder), "device": "cpu", "options": {"threads": 1}} | fields
        config = DeploymentConfig.parse(values)
        return loading.load_executor(config, replica=0, rank=0, gpus=None, folder=tmp_path, report=lambda phase: None)

    return run


def answer(executor: Executor) -> np.ndarray:
    executor.encode(EncodeRequest(1, [3, 9, 27, 81, 5], [4, 1], time.monotonic()))
    events: list[Any] = []
    while executor.busy:
        executor.step(events.append, lambda: None)
    (event,) = events
    assert isinstance(event, EncodedEvent)
    return np.frombuffer(event.values, np.float32).reshape(-1, event.columns)


def test_a_start_from_a_folder(start: Callable[..., Executor], folders: dict[str, Path], tmp_path: Path) -> None:
    executor = start()
    info, lines = executor.info, {line.what: line for line in executor.info.plan.lines}
    assert (info.engine, info.labels, info.function, info.max_length) == ("optimized", ("a", "b", "c"), "softmax", 48)
    assert lines["parity"].choice == "passed"
    assert lines["kernels"].choice == "compiled for this CPU"
    assert (tmp_path / "tokenizer" / "tokenizer.json").exists()
    encoder = load(folders["text-classification"], "text-classification")
    wanted = encoder.outputs(EncoderBatch.of_sequences([[3, 9, 27, 81], [5]], rows="first")).softmax(-1)
    assert np.allclose(answer(executor), wanted.numpy(), atol=1e-5)


def test_both_engines_answer_alike(start: Callable[..., Executor], tmp_path: Path) -> None:
    fused = answer(start())
    shutil.rmtree(tmp_path / "model")
    plain = start(engine="baseline")
    assert (plain.info.engine, plain.info.labels, plain.info.function) == ("baseline", ("a", "b", "c"), "softmax")
    assert np.allclose(answer(plain), fused, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_weights_that_are_not_finite_end_the_start(start: Callable[..., Executor], dtype: str) -> None:
    def break_one(tensors: dict[str, Tensor]) -> None:
        tensors["bert.encoder.layer.1.attention.self.key.weight"][3, 3] = float("nan")

    with pytest.raises(BrokenCheckpoint, match=r"layer\.1\.attention\.self\.key\.weight .* holds NaN"):
        start(break_one, dtype=dtype)


def test_a_failed_check_falls_back(
    start: Callable[..., Executor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_parity, "check", lambda *_: ParityReport(0.5, 1e-4, "layer 1", 0.0))
    executor = start()
    assert executor.info.engine == "baseline"
    assert "differ from their reference" in executor.info.plan.warnings[0]
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(RankFailed, match="layer 1"):
        start(options={"threads": 1, "parity": "raise"})


def test_what_has_no_fused_form_is_served_by_transformers(start: Callable[..., Executor]) -> None:
    executor = start(lambda t: t.update({"bert.encoder.layer.0.gate": torch.zeros(2)}))
    assert executor.info.engine == "baseline"
    assert "tensors unknown to bert: encoder.layer.0.gate" in executor.info.plan.warnings[0]
    assert answer(executor).shape == (2, 3)


def test_dummy_weights(start: Callable[..., Executor]) -> None:
    assert np.allclose(answer(start(load_format="dummy")).sum(1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "labels", "words"),
    [
        ({}, ("LABEL_0", "LABEL_1"), ""),
        ({"num_labels": 1}, ("LABEL_0",), ""),
        ({"id2label": {"1": "b", "0": "a"}}, ("a", "b"), ""),
        ({"id2label": {"0": "a"}, "num_labels": 2}, ("LABEL_0", "LABEL_1"), "names 1 of the 2 labels"),
        ({"id2label": {"1": "a", "2": "b"}}, ("LABEL_0", "LABEL_1"), "other numbers"),
        ({"id2label": {"x": "a", "y": "b"}}, ("LABEL_0", "LABEL_1"), "cannot be read"),
        ({"id2label": ["a", "b"]}, ("LABEL_0", "LABEL_1"), "cannot be read"),
    ],
)
def test_labels(config: dict[str, Any], labels: tuple[str, ...], words: str) -> None:
    found, wrong = labels_of(config)
    assert found == labels
    assert words in wrong
    assert bool(words) == bool(wrong)


@pytest.mark.parametrize(
    ("config", "function"),
    [
        ({}, "softmax"),
        ({"num_labels": 1}, "sigmoid"),
        ({"problem_type": "multi_label_classification", "num_labels": 4}, "sigmoid"),
        ({"problem_type": "regression", "num_labels": 1}, "none"),
        ({"problem_type": "single_label_classification", "num_labels": 4}, "softmax"),
    ],
)
def test_functions_are_those_of_transformers_pipeline(config: dict[str, Any], function: str) -> None:
    assert function_of(config) == function


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position_embedding_type": "relative_key_query"}, "'relative_key_query' have no fused form"),
        ({"is_decoder": True}, "is_decoder has no fused form"),
        ({"hidden_act": "mish"}, "'mish' has no fused form"),
        ({"quantization_config": {"quant_method": "bnb"}}, "quantized already"),
        ({"hidden_size": 41}, "no multiple of 4 heads"),
        ({"num_hidden_layers": 0}, "layers is 0"),
    ],
)
def test_configurations_without_a_fused_form(
    folders: dict[str, Path], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    config = json.loads((folders["fill-mask"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    info = models.inspect(tmp_path, load_format="dummy")
    assert not info.optimized
    assert info.unfused is not None
    assert words in info.unfused.message
    assert info.serving("fill-mask").encoder is None


def test_a_question_answerer_has_two_outputs(folders: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((folders["text-classification"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["BertForQuestionAnswering"]}))
    unfused = models.inspect(tmp_path, load_format="dummy").unfused
    assert unfused is not None
    assert "3 outputs answers no questions" in unfused.message
