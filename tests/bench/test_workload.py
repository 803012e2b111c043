from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from miinb.bench.workload import configure, points, tokenizer_offsets


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from miinb.bench.workload import WORDS

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("tokens", [2, 7, 128])
def test_synthetic_prompts_have_the_length_asked_for(tokenizer_folder: Path, tokens: int) -> None:
    offsets = tokenizer_offsets(tokenizer_folder)
    assert offsets is not None
    config = configure(None, {"prompt_tokens": tokens, "requests": 4, "warmup": 1})
    jobs = [job for point in points(config, offsets) for job in (*point.warmup, *sum(point.blocks, ()))]
    assert [len(offsets(job.prompt)) for job in jobs] == [tokens] * 5


def test_prompts_differ_and_repeat_with_the_seed() -> None:
    config = configure(None, {"concurrency": [1, 2], "requests": 4, "seed": 3})
    first, again = points(config), points(config)
    assert first == again
    prompts = [job.prompt for point in first for job in (*point.warmup, *sum(point.blocks, ()))]
    assert len(set(prompts)) == len(prompts)
    other = points(configure(None, {"concurrency": [1, 2], "requests": 4, "seed": 4}))
    assert other[0].blocks[0][0].prompt != first[0].blocks[0][0].prompt


def test_arrivals_are_poisson_with_the_rate() -> None:
    (point,) = points(configure("hi", {"rate": 5.0, "requests": 2000}))
    (block,) = point.blocks
    assert block[-1].offset_s == pytest.approx(400.0, rel=0.1)
    assert all(job.offset_s == 0 for job in point.warmup)


def test_blocks_are_split_only_when_long_enough() -> None:
    assert [len(b) for b in points(configure("hi", {"requests": 8}))[0].blocks] == [4, 4]
    assert [len(b) for b in points(configure("hi", {"requests": 16, "concurrency": 4}))[0].blocks] == [16]


def test_the_warm_up_fills_the_point_once() -> None:
    assert len(points(configure("hi", {"concurrency": 8, "warmup": 2}))[0].warmup) == 8
    assert points(configure("hi", {"concurrency": 8, "warmup": 0}))[0].warmup == ()


def test_prompts_come_in_any_form() -> None:
    frame = pd.DataFrame({"id": [1, 2], "prompt": ["a", "b"]})
    for workload in (["a", "b"], frame, frame["prompt"], {"prompts": ["a", "b"]}, ("a", "b")):
        assert configure(workload).prompts == ["a", "b"]
    assert configure("a").prompts == ["a"]
    assert configure(["a"] * 20).requests == 20
    assert configure(None, {"concurrency": 16}).requests == 32
