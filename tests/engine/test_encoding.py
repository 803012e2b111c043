"""The executor of encoders over transformers' models: the answers of each text alone, whatever shares a step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from miinb.config import DeploymentConfig, GenerationParams
from miinb.engine.encode_queue import Bounds
from miinb.engine.encoder import EncoderBatch
from miinb.engine.encoding import EncodeExecutor
from miinb.engine.transformers_encoder import TransformersEncoder, load_encoding
from miinb.errors import InvalidRequest, PromptTooLong, QueueFull, UnsupportedModel
from miinb.messages import EncodedEvent, EncodeRequest, EngineInfo, FailedEvent, FinishedEvent, Plan, SequenceRequest
from miinb.tasks import TASKS

VOCAB = 61
PAD = 1
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 42,
    "pad_token_id": PAD,
    "type_vocab_size": 2,
}
DISTIL = {"vocab_size": VOCAB, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "pad_token_id": PAD}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "roberta": SIZES,
    "xlm-roberta": SIZES,
    "distilbert": DISTIL | {"max_position_embeddings": 42},
    "albert": SIZES | {"embedding_size": 16},
    "electra": SIZES | {"embedding_size": 16},
    "mpnet": SIZES,
    "deberta-v2": SIZES | {"type_vocab_size": 0, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
}
LENGTHS = [7, 1, 19, 4, 12, 40, 2]


def build(family: str, task: str) -> Any:
    torch.manual_seed(len(family))
    config = transformers.AutoConfig.for_model(
        family, **(FAMILIES[family] | {"num_labels": 2 if task == "question-answering" else 3})
    )
    model = getattr(transformers, TASKS[task].auto_class).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def sequences(lengths: list[int] | None = None, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[int(token) for token in rng.integers(3, VOCAB, n)] for n in (LENGTHS if lengths is None else lengths)]


def info_of(task: str, **changes: Any) -> EngineInfo:
    values = {
        "replica": 0, "model": "m", "task": task, "engine": "baseline", "dtype": "fp32", "device": "cpu",
        "vocab_size": VOCAB, "max_length": 40, "max_batch": 4, "eos_token_ids": (), "tokenizer_folder": "",
        "plan": Plan("baseline", "cpu", "fp32"),
    }  # fmt: skip
    return EngineInfo(**(values | changes))


def serve(model: Any, task: str, engine: str = "optimized", **changes: Any) -> EncodeExecutor:
    config = DeploymentConfig.parse({"model": "m", "engine": engine, "options": changes.pop("options", {})})
    return load_encoding(model, config, info_of(task, **changes))


def ask(row_id: int, texts: list[list[int]], deadline: float | None = None, **options: Any) -> EncodeRequest:
    places = np.cumsum([0, *map(len, texts)])[:-1]
    masks, types = options.pop("masks", None), options.pop("types", False)
    return EncodeRequest(
        row_id, [token for text in texts for token in text], [len(text) for text in texts], time.monotonic(),
        type_ids=[int(i > len(text) // 2) for text in texts for i in range(len(text))] if types else (),
        wanted=() if masks is None else [int(places[i]) + place for i, place in masks],
        options=options, deadline=deadline,
    )  # fmt: skip


def run(executor: EncodeExecutor, poll: Callable[[], None] = lambda: None) -> dict[int, Any]:
    events: dict[int, Any] = {}

    def take(event: Any) -> None:
        assert event.row_id not in events
        events[event.row_id] = event

    for _ in range(200):
        if not executor.busy:
            return events
        executor.step(take, poll)
    pytest.fail("the executor does not come to an end")


def values(event: Any) -> Any:
    assert isinstance(event, EncodedEvent), event
    return np.frombuffer(event.values, np.float32).reshape(-1, event.columns)


def alone(model: Any, task: str, text: list[int], *, types: bool = False) -> torch.Tensor:
    """transformers' outputs of one text: [1, C] of a text classifier, else [tokens, C]."""
    inputs = {"input_ids": torch.tensor([text])}
    if types:
        inputs["token_type_ids"] = torch.tensor([[int(i > len(text) // 2) for i in range(len(text))]])
    with torch.inference_mode():
        found = model(**inputs)
    if task == "question-answering":
        return torch.stack([found.start_logits[0], found.end_logits[0]], -1)
    if task == "text-classification":
        return found.logits
    return found.last_hidden_state[0] if task == "feature-extraction" else found.logits[0]


@pytest.mark.parametrize("engine", ["optimized", "baseline"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_has_the_answer_that_it_has_alone(family: str, engine: str) -> None:
    task, texts = "token-classification", sequences()
    model = build(family, task)
    types = family in ("bert", "roberta", "xlm-roberta", "albert", "electra")
    assert TransformersEncoder(model, task).token_types == (2 if types else 0)
    executor = serve(model, task, engine)
    executor.encode(ask(1, texts, types=types))
    executor.encode(ask(2, texts[:1], types=types))
    events = run(executor)
    wanted = torch.cat([alone(model, task, text, types=types) for text in texts]).softmax(-1).numpy()
    np.testing.assert_allclose(values(events[1]), wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(values(events[2]), wanted[: len(texts[0])], rtol=1e-4, atol=1e-6)
    assert executor.status()["steps"] == (2 if engine == "optimized" else 3)
    for event in events.values():
        assert event.model_s > 0
        assert event.queue_s >= 0


def test_every_task() -> None:
    texts = sequences()
    for task in TASKS:
        if TASKS[task].streams or TASKS[task].image:
            continue
        model = build("bert", task)
        executor = serve(model, task)
        masks = [(0, 2), (2, 0), (2, 11), (5, 39)] if task == "fill-mask" else None
        executor.encode(ask(1, texts, masks=masks))
        event = run(executor)[1]
        found = [alone(model, task, text) for text in texts]
        if task == "fill-mask":
            shares = torch.stack([found[i][place] for i, place in masks or []]).softmax(-1)
            best = shares.topk(5)
            assert np.frombuffer(event.ids, np.int32).reshape(-1, 5).tolist() == best.indices.tolist()
            wanted = best.values
        elif task == "feature-extraction":
            wanted = torch.stack([hidden.mean(0) for hidden in found])
        else:
            wanted = torch.cat(found)
        wanted = wanted.softmax(-1) if "classification" in task else wanted
        np.testing.assert_allclose(values(event), wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_requests_with_different_options_share_a_step() -> None:
    model = build("bert", "feature-extraction")
    executor = serve(model, "feature-extraction", max_batch=16)
    texts = sequences([5, 9, 3])
    options = [{"pooling": "none"}, {"pooling": "mean", "normalize": True}, {"pooling": "first"}, {"pooling": "none"}]
    for row, one in enumerate(options):
        executor.encode(ask(row, texts if row else texts[:2], **one))
    events = run(executor)
    assert executor.status()["steps"] == 1
    hidden = [alone(model, "feature-extraction", text) for text in texts]
    unit = torch.nn.functional.normalize(torch.stack([part.mean(0) for part in hidden]), dim=-1)
    wanted = [torch.cat(hidden[:2]), unit, torch.stack([part[0] for part in hidden]), torch.cat(hidden)]
    for row, rows in enumerate(wanted):
        np.testing.assert_allclose(values(events[row]), rows.numpy(), rtol=1e-4, atol=1e-5)


def test_a_huge_request_does_not_hold_up_a_small_one() -> None:
    model = build("bert", "text-classification")
    executor = serve(model, "text-classification")
    executor.encode(ask(1, sequences([6] * 40)))
    order: list[int] = []
    executor.step(lambda event: order.append(event.row_id), lambda: None)
    assert executor.status()["running"] == 1
    executor.encode(ask(2, sequences([8])))
    executor.step(lambda event: order.append(event.row_id), lambda: None)
    assert order == [2]
    assert values(run(executor)[1]).shape == (40, 3)
    status = executor.status()
    assert (status["served"], status["running"], status["waiting"]) == (2, 0, 0)
    assert (status["steps"], status["sequences"], status["tokens"]) == (11, 41, 248)


def test_a_model_without_padding_computes_one_text_at_a_time() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=40, num_labels=2)
    model = transformers.GPT2ForSequenceClassification(config).eval()
    texts = sequences([5, 9])
    executor = serve(model, "text-classification")
    executor.encode(ask(1, texts))
    wanted = torch.cat([alone(model, "text-classification", text) for text in texts]).softmax(-1)
    np.testing.assert_allclose(values(run(executor)[1]), wanted.numpy(), rtol=1e-4)
    assert executor.status()["steps"] == 2


def test_positions_that_padding_takes_are_not_the_text_s() -> None:
    assert TransformersEncoder(build("bert", "fill-mask"), "fill-mask").max_length == 42
    assert TransformersEncoder(build("roberta", "fill-mask"), "fill-mask").max_length == 40
    executor = serve(build("roberta", "fill-mask"), "fill-mask", max_length=42)
    assert executor.info.max_length == 40
    with pytest.raises(PromptTooLong, match="41 tokens, but the model takes 40"):
        executor.encode(ask(1, sequences([41])))


def compiling(task: str) -> tuple[Any, EncodeExecutor]:
    """A model, and its executor with `options.compile`."""
    model = build("bert", task)
    return model, serve(model, task, "baseline", options={"compile": True})


def check_answers(model: Any, executor: EncodeExecutor) -> None:
    """Of several shapes."""
    for row, texts in enumerate((sequences(), sequences([3]), sequences([8, 5]))):
        executor.encode(ask(row, texts))
        wanted = torch.cat([alone(model, executor.info.task, text) for text in texts]).softmax(-1)
        np.testing.assert_allclose(values(run(executor)[row]), wanted.numpy(), rtol=1e-4, atol=1e-6)


def test_a_model_that_cannot_be_compiled_runs_eagerly_and_the_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda model, mode: broken)
    model, executor = compiling("text-classification")
    assert str(executor.info.plan).splitlines()[-1] == "torch.compile  eager: compiling failed (RuntimeError)"
    check_answers(model, executor)


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_answers() -> None:
    model, executor = compiling("text-classification")
    line = executor.info.plan.lines[-1]
    assert line.what == "torch.compile"
    assert "ms eager" in line.reason
    executor.model._run = torch.compile(model)  # type: ignore[union-attr]  # also where it is slower
    check_answers(model, executor)


# ---------------------------------------------------------------------- what goes wrong


class Faulty:
    """A model that raises or answers NaN where it meets some tokens."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.broken: dict[int, Exception] = {}
        self.nan = -1
        self.most_tokens = 1 << 20
        self.steps: list[int] = []

    def outputs(self, batch: EncoderBatch) -> torch.Tensor:
        self.steps.append(len(batch.token_ids))
        for token, error in self.broken.items():
            if (batch.token_ids == token).any():
                raise error
        if len(batch.token_ids) > self.most_tokens:
            raise torch.OutOfMemoryError("no memory")
        found: torch.Tensor = self.model.outputs(batch)
        found[batch.token_ids[batch.rows] == self.nan] = torch.nan
        return found


@pytest.fixture(params=["computed and read", "launched ahead"])
def faulty(request: pytest.FixtureRequest) -> tuple[Faulty, EncodeExecutor]:
    task = "token-classification"
    model = Faulty(TransformersEncoder(build("bert", task), task))
    bounds = Bounds(max_length=40, vocab_size=VOCAB, token_types=2, max_tokens=64)
    ahead = request.param == "launched ahead"
    return model, EncodeExecutor(model, info_of(task), bounds, max_queue=3, launch_ahead=ahead)


def test_who_raises_again_alone_fails_with_it(faulty: tuple[Faulty, EncodeExecutor]) -> None:
    model, executor = faulty
    model.broken[2] = RuntimeError("at /root/x")
    for row, texts in enumerate(([[5, 6]], [[7, 2]], [[8], [9, 9]])):
        executor.encode(ask(row, texts))
    events = run(executor)
    assert isinstance(events[1], FailedEvent)
    assert "/root" not in events[1].message
    assert model.steps == [7, 2, 2, 3]
    assert len(values(events[0])) == 2
    assert len(values(events[2])) == 3


def test_numbers_that_are_not_finite_fail_their_request_alone(faulty: tuple[Faulty, EncodeExecutor]) -> None:
    model, executor = faulty
    model.nan = 2
    executor.encode(ask(1, [[5, 6], [2, 3]]))
    executor.encode(ask(2, [[7]]))
    events = run(executor)
    assert events[1].error == "NonFinite"
    assert len(values(events[2])) == 1


def test_without_memory_steps_are_halved_and_the_plan_says_so(faulty: tuple[Faulty, EncodeExecutor]) -> None:
    model, executor = faulty
    model.most_tokens = 20
    texts = sequences([10] * 6)
    executor.encode(ask(1, texts))
    executor.encode(ask(2, texts[:1]))
    events = run(executor)
    assert model.steps == [60, 30, 10, 10, 10, 10, 10, 10, 10]
    assert executor.queue.max_tokens == 15
    assert executor.info.plan.lines[-1].choice == "15 tokens"
    assert "limited to 15 tokens" in executor.info.plan.warnings[-1]
    np.testing.assert_array_equal(values(events[1])[:10], values(events[2]))
    executor.encode(ask(3, sequences([21])))
    executor.encode(ask(4, [[5]]))
    events = run(executor)
    assert events[3].error == "OutOfMemory"
    assert len(values(events[4])) == 1


def test_a_request_that_fails_early_computes_no_further(faulty: tuple[Faulty, EncodeExecutor]) -> None:
    model, executor = faulty
    model.nan = 2
    executor.encode(ask(1, [[2] * 40, [5] * 40, [6] * 40]))
    assert run(executor)[1].error == "NonFinite"
    assert model.steps == [40, 40][: 2 if executor._ahead else 1]


def test_queue_deadline_and_cancel(faulty: tuple[Faulty, EncodeExecutor]) -> None:
    model, executor = faulty
    executor.encode(ask(1, [[5]], deadline=time.monotonic() - 1))
    executor.encode(ask(2, [[5]], deadline=time.monotonic() + 60))
    executor.encode(ask(3, [[5]]))
    with pytest.raises(QueueFull, match="3 requests wait"):
        executor.encode(ask(4, [[5]]))
    executor.cancel(3, "cancelled")
    executor.cancel(77, "cancelled")
    events = run(executor)
    assert events[1].error == "DeadlineExceeded"
    assert len(values(events[2])) == 1
    assert isinstance(events[3], FinishedEvent)
    assert events[3].finish_reason == "cancelled"
    assert model.steps == [1]
    executor.encode(ask(5, [[5] * 40, [6] * 40], deadline=time.monotonic() + 0.05))  # begun in time
    executor.encode(ask(6, [[7] * 40]))
    executor.step(lambda event: pytest.fail("too early"), lambda: None)
    time.sleep(0.06)
    executor.cancel(6, "cancelled")
    events = run(executor)
    assert len(values(events[5])) == 80
    assert events[6].finish_reason == "cancelled"


def test_what_is_not_a_request_of_the_task(faulty: tuple[Faulty, EncodeExecutor]) -> None:
    _, executor = faulty
    with pytest.raises(InvalidRequest, match="Use predict"):
        executor.submit(SequenceRequest(1, [5], GenerationParams(seed=0), 0.0))
    with pytest.raises(InvalidRequest, match="no option 'top_k'"):
        executor.encode(ask(1, [[5]], top_k=1))
    executor.encode(ask(2, []))
    assert run(executor) == {2: dataclasses.replace(EncodedEvent(2, 0, b""), queue_s=pytest.approx(0.0, abs=1.0))}
    with pytest.raises(UnsupportedModel, match="text-to-image is not served yet"):
        EncodeExecutor(executor.model, info_of("text-to-image"), executor.queue.bounds, max_queue=1)  # type: ignore[arg-type]


def test_an_answer_too_large_for_a_frame_is_refused(
    faulty: tuple[Faulty, EncodeExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miinb.engine.encoding.MAX_ANSWER_BYTES", 100)
    _, executor = faulty
    executor.encode(ask(1, [[5] * 9]))
    executor.encode(ask(2, [[5] * 8]))
    events = run(executor)
    assert "Send fewer texts" in events[1].hint
    assert len(values(events[2])) == 8
