"""Prompts of conversations: a turn begins with the one before it, and what does not fit goes, oldest first."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from miinb.config import GenerationParams
from miinb.demo import tiny_model
from miinb.engine.tokenizer_files import ensure_chat_template
from miinb.errors import PromptTooLong
from miinb.messages import GenerateRequest
from miinb.server.prompts import Message, Prompt, tokenize
from miinb.server.text import TextCodec
from tests.tiny_tokenizers import byte_level

ANSWERS = ("A fox.", "a NUL \0", " Paris is the capital.", "", "\n\nTwo lines\n", "日本 😀", "x" * 300)


def say(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def prompt(text: TextCodec, messages: list[Message], max_length: int = 4096, max_new_tokens: int = 16) -> Prompt:
    params = GenerationParams(max_new_tokens=max_new_tokens)
    return asyncio.run(tokenize(GenerateRequest(None, params, tuple(messages)), text, max_length))


@pytest.fixture(scope="module")
def tiny() -> TextCodec:
    """The tokenizer and template (ChatML) of the model in the package."""
    return TextCodec.load(Path(tiny_model()))


def begins_with(longer: list[int], shorter: list[int]) -> bool:
    return longer[: len(shorter)] == shorter


def test_a_turns_prompt_begins_with_the_one_before(tiny: TextCodec) -> None:
    messages = [say("system", "Be brief.")]
    before: list[int] = []
    for number, answer in enumerate(ANSWERS * 2):
        messages.append(say("user", f"Question {number}?"))
        now = prompt(tiny, messages)
        assert now.dropped == 0
        said = ANSWERS[number % len(ANSWERS) - 1]
        # (an answer that begins with a line's end joins the one that the template puts before it)
        assert begins_with(now.token_ids, before[:-1] if said.startswith("\n") else before)
        before = now.token_ids
        messages.append(say("assistant", answer))


@pytest.mark.parametrize("trims", [False, True])
def test_what_does_not_fit_goes_oldest_first_and_the_cut_stays_for_several_turns(tiny: TextCodec, trims: bool) -> None:
    """Whether the caller keeps its whole history or trims it by what the result says."""
    system = say("system", "Be brief.")
    messages = [system]
    before: list[int] = []
    hits, drops = 0, set()
    for number in range(60):
        messages.append(say("user", f"Question number {number} of many, with some words in it?"))
        now = prompt(tiny, messages, max_length=500, max_new_tokens=40)
        assert len(now.token_ids) <= 460
        assert now.messages[0] == system
        assert list(now.messages[1:]) == messages[1 + now.dropped :]
        assert now.messages[1]["role"] == "user"
        drops.add(now.dropped)
        hits += begins_with(now.token_ids, before)
        before = now.token_ids
        if trims:
            messages = list(now.messages)
        messages.append(say("assistant", f"Answer {number} is what it is, no more and no less."))
    assert max(drops) > 0
    assert hits > 40


def test_ten_thousand_turns(tiny: TextCodec) -> None:
    turn = (say("user", "How are you today, my friend?"), say("assistant", "Very well, thank you."))
    messages = [*(turn * 10_000), say("user", "And now?")]
    now = prompt(tiny, messages, max_length=512)
    assert 256 < len(now.token_ids) <= 496
    assert now.dropped + len(now.messages) == len(messages)


def test_the_last_message_is_never_cut(tiny: TextCodec) -> None:
    long = say("user", "A story. " * 2000)
    with pytest.raises(PromptTooLong):
        prompt(tiny, [say("user", "Hi"), say("assistant", "Hi"), long], max_length=512)
    with pytest.raises(PromptTooLong, match="context of 512"):
        prompt(tiny, [say("user", "Hi " * 20)], max_length=512, max_new_tokens=500)
    with pytest.raises(PromptTooLong):
        prompt(tiny, [say("system", "Rules. " * 1000), say("user", "Hi")], max_length=512)


def test_a_prompt_goes_on_as_text(tiny: TextCodec) -> None:
    history = [say("user", "Once upon"), say("assistant", " a time,")]
    params = GenerationParams(max_new_tokens=4, return_full_text=True)
    now = asyncio.run(tokenize(GenerateRequest(" there", params), tiny, 100, history))
    assert now.token_ids == tiny.encode("Once upon a time, there")
    assert now.shown == "Once upon a time, there"


def test_a_model_without_a_template_gets_the_plain_one(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "a", chat=False)
    assert not ensure_chat_template(folder)
    assert not ensure_chat_template(folder)  # as a second replica finds it
    messages = [say("user", "Hi"), say("assistant", "Ho"), say("user", "He")]
    assert TextCodec.load(folder).render_chat(messages) == "Hi</s>Ho</s>He</s>"
    bare = shutil.copytree(folder, tmp_path / "b")
    (bare / "tokenizer_config.json").write_text(json.dumps({}))
    (bare / "special_tokens_map.json").unlink(missing_ok=True)
    assert TextCodec.load(bare).render_chat(messages) == "Hi\nHo\nHe\n"
    assert ensure_chat_template(byte_level(tmp_path / "c"))
