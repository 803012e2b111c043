"""The tiny model inside the package: small, whole, coherent, and the work of the script that it names."""

from __future__ import annotations

import itertools
import json

import pytest

from miinb import tasks
from miinb.demo import stories, tiny_encoder, tiny_model
from miinb.errors import InvalidValue
from miinb.models import inspect


def test_it_is_small_and_names_its_origin() -> None:
    folder = tiny_model()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2_000_000
    facts = json.loads((folder / "provenance.json").read_text())
    assert facts["license"] == "MIT"
    assert {"seed", "steps", "loss", "torch", "transformers", "date"} <= set(facts)


def test_the_grammar_is_seeded() -> None:
    first, again, other = (list(itertools.islice(stories.documents(seed), 20)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.fixture(scope="module")
def loaded():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(tiny_model())


def continuation(loaded, prompt: str) -> str:
    model, tokenizer = loaded
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=120, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_it_tells_a_story_and_ends(loaded) -> None:
    text = continuation(loaded, "Once upon a time,")
    assert text.startswith(" there was a")
    hero = text.split(" named ")[1].split(".")[0]
    assert hero in stories.NAMES
    assert text.count(hero) >= 3  # it remembers whom the story is about
    assert text.endswith(".")


def test_it_knows_its_capitals_through_the_chat_template(loaded) -> None:
    _, tokenizer = loaded
    for country in ("Japan", "France", "Norway"):
        message = {"role": "user", "content": f"What is the capital of {country}?"}
        prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        assert prompt.endswith("<|im_start|>assistant\n")
        assert continuation(loaded, prompt).startswith(f"The capital of {country} is {stories.CAPITALS[country]}.")


def test_any_text_survives_the_tokenizer(loaded) -> None:
    _, tokenizer = loaded
    for text in ("naïve café 😀", "  two  spaces\n\ttab", "{'json': [1, 2.5]}", "<b>&amp;</b>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tiny_encoders_have_a_head_for_every_task() -> None:
    served = [task.name for task in tasks.TASKS.values() if not task.streams and not task.image]
    found = {task: inspect(tiny_encoder(task)) for task in served}
    assert all(task in facts.tasks or task == "feature-extraction" for task, facts in found.items())
    assert sum(path.stat().st_size for path in tiny_encoder("fill-mask").parent.rglob("*") if path.is_file()) < 1 << 20
    with pytest.raises(InvalidValue, match="no tiny encoder"):
        tiny_encoder("fil-mask")
