"""An encoder's steps through graphs that compute again: the answers of eager steps, whatever they are padded with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miinb.config import DeploymentConfig
from miinb.engine.encoder import EncoderBatch
from miinb.engine.encoder_executor import fused_executor
from miinb.engine.encoder_graphs import MOST_ROWS, GraphedEncoder, capture_order, graph_sizes
from miinb.engine.encoder_inputs import EncoderInputs, Sizes
from miinb.engine.encoding import EncodeExecutor
from miinb.engine.reduction import ROWS, Reduction, usual_reduction
from tests.engine import tiny_encoders
from tests.engine.recomputing import Recomputing
from tests.engine.test_encoder import load
from tests.engine.test_encoding import ask, info_of, run, sequences, values

LONGEST = 48


def eager(folder: Path, task: str) -> EncodeExecutor:
    config = DeploymentConfig.parse({"model": "m", "options": {"max_step_tokens": 128}})
    return fused_executor(load(folder, task), config, info_of(task, max_length=64), lambda phase: None)


@pytest.mark.parametrize("task", ROWS)
def test_padded_steps_give_the_answers_of_eager_ones(task: str, tmp_path: Path) -> None:
    tiny_encoders.build("bert", task, tmp_path)
    plain, graphed = eager(tmp_path, task), eager(tmp_path, task)
    assert plain.info.max_length == LONGEST
    assert ("steps", "128 tokens") in [(line.what, line.choice) for line in plain.info.plan.lines]
    recorder: Any = Recomputing()
    inputs = graphed.inputs
    assert graphed.model is not None
    usual = usual_reduction(task, function="", vocab_size=graphed.info.vocab_size, labels=3)
    model = GraphedEncoder(graphed.model, inputs, usual, graph_sizes(96, LONGEST, ROWS[task]), recorder)
    graphed.model = graphed.reducing = model
    assert str(graphed.model).startswith("8 of steps of 16 to 96 tokens")
    # One text, a full step, a larger one, one of more texts than a graph takes, and one of as many.
    loads = [[9], [48, 3, 40], [30, 30, 30, 30], [2] * 13, [1], [17, 5, 31], [1] * 8]
    options: list[dict[str, Any]] = [{}] * len(loads)
    if task == "text-classification":
        options[5] = options[6] = {"top_k": 1}  # as clients of many labels ask: not reduced in the graph
    for row, lengths in enumerate(loads):
        masks = [(0, 0), (len(lengths) - 1, lengths[-1] - 1)][: len(lengths)] if task == "fill-mask" else None
        answers = []
        for executor in (plain, graphed):
            executor.encode(ask(row, sequences(lengths, row), masks=masks, **options[row]))
            answers.append(run(executor)[row])
        np.testing.assert_allclose(*map(values, answers), rtol=1e-4, atol=1e-6)
        assert answers[0].ids == answers[1].ids
    assert plain.status()["steps"] == graphed.status()["steps"] == len(loads)
    assert recorder.replays == len(loads) - 2


@pytest.mark.parametrize("graphed", [False, True])
@pytest.mark.parametrize("name", ["roberta", "roberta-untied", "xlm-roberta", "camembert", "bert"])
def test_a_padding_token_in_a_text_has_no_place_where_transformers_gives_it_none(
    name: str, graphed: bool, tmp_path: Path
) -> None:
    model = tiny_encoders.build(name, "feature-extraction", tmp_path)
    executor = eager(tmp_path, "feature-extraction")
    if graphed:
        sizes = graph_sizes(96, LONGEST, "all")
        usual, recorder = Reduction("feature-extraction"), Recomputing()
        assert executor.model is not None
        executor.model = executor.reducing = GraphedEncoder(executor.model, executor.inputs, usual, sizes, recorder)
    pad = model.config.pad_token_id
    texts = [[5, pad, 9, pad, pad, 7], [7, 8, 9], [pad, 5], [pad], [9, 8, 7, pad], [*range(3, 50), pad]]
    for row, asked in enumerate(([texts[0]], texts, [texts[1]])):
        executor.encode(ask(row, asked, pooling="none"))
        found = values(run(executor)[row])
        with torch.inference_mode():
            ones = [torch.ones(1, len(text), dtype=torch.int64) for text in asked]
            wanted = [
                model(torch.tensor([text]), attention_mask=mask).last_hidden_state[0].numpy()
                for text, mask in zip(asked, ones, strict=True)
            ]
        np.testing.assert_allclose(found, np.concatenate(wanted), rtol=1e-4, atol=1e-5)


class Summing:
    """A model whose outputs tell what is in the batch."""

    def outputs(self, batch: EncoderBatch) -> torch.Tensor:
        tokens = batch.token_ids + 100 * batch.positions + 10000 * batch.type_ids
        return tokens[batch.rows][:, None].float()


def test_a_graph_reads_what_was_written_last_and_nothing_of_larger_steps() -> None:
    inputs = EncoderInputs(64, torch.device("cpu"))
    recorder: Any = Recomputing()
    model = GraphedEncoder(Summing(), inputs, Reduction("feature-extraction"), graph_sizes(64, 40, "all"), recorder)
    executor = EncodeExecutor(model, info_of("feature-extraction"), bounds(), max_queue=9, inputs=inputs)
    for row, lengths in enumerate(([40, 20], [5], [3, 3, 3])):
        texts = sequences(lengths, row)
        executor.encode(ask(row, texts, pooling="none", types=True))
        wanted = [
            token + 100 * place + 10000 * (place > len(text) // 2) for text in texts for place, token in enumerate(text)
        ]
        assert values(run(executor)[row])[:, 0].tolist() == wanted
        batch = inputs.batch(inputs.graphs[-1])
        assert batch.token_ids.data_ptr() == inputs.batch(inputs.graphs[0]).token_ids.data_ptr()
    assert recorder.replays == 3


def bounds() -> Any:
    from miinb.engine.encode_queue import Bounds

    return Bounds(max_length=40, vocab_size=61, token_types=2, max_tokens=64)


def test_the_captures_end_with_time() -> None:
    recorder: Any = Recomputing()
    recorder.enough = True
    inputs = EncoderInputs(64, torch.device("cpu"))
    model = GraphedEncoder(Summing(), inputs, Reduction("feature-extraction"), graph_sizes(64, 40, "all"), recorder)
    assert inputs.graphs == []
    batch = EncoderBatch.of_sequences([[5, 6]])
    assert model.outputs(batch)[:, 0].tolist() == [5, 106]


def test_small_steps_have_their_graphs_first() -> None:
    order = capture_order(graph_sizes(16384, 512, "first"))
    tokens = [size.tokens for size in order]
    large = next(i for i, count in enumerate(tokens) if count > 4096)
    assert (tokens[0], tokens[1], tokens[large], tokens[large + 1]) == (4096, 16, 16384, 5120)
    assert max(tokens[:large]) <= 4096 < min(tokens[large:])
    assert sorted(order) == graph_sizes(16384, 512, "first")
    assert [size.tokens for size in capture_order(graph_sizes(48, 16, "all"))] == [48, 16, 32]


@pytest.mark.parametrize("rows", ["first", "all", "wanted"])
@pytest.mark.parametrize(("most", "longest"), [(16384, 512), (256, 77), (40, 512), (16, 8)])
def test_every_usual_step_has_a_graph_and_is_padded_little(most: int, longest: int, rows: Any) -> None:
    sizes = graph_sizes(most, longest, rows)
    assert sizes == sorted(set(sizes))
    assert len(sizes) < 64
    for tokens in range(1, most + 1, 7):
        for length in (min(tokens, longest), min(tokens, longest, 20)):
            count = -(-tokens // length)
            outputs = {"first": count, "all": tokens, "wanted": count}[rows]
            found = next((size for size in sizes if size.holds(Sizes(tokens, length, count, outputs))), None)
            if rows == "wanted" and outputs > MOST_ROWS:
                assert found is None
                continue
            assert found is not None, (tokens, length)
            assert found.tokens - tokens <= max(16, tokens // 2), (tokens, found)


def test_steps_that_no_graph_holds() -> None:
    size = Sizes(1024, 128, 64, 1024)
    assert size.holds(Sizes(600, 100, 60, 600))
    assert not size.holds(Sizes(500, 100, 60, 500))  # padded to twice its tokens
    assert not size.holds(Sizes(1000, 129, 60, 1000))
    assert not size.holds(Sizes(1000, 100, 65, 1000))
