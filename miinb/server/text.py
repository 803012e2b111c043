"""Text of a request: tokenize, render a chat, detokenize without splitting a character, find stop strings.

Reads the tokenizer folder that rank 0 wrote (tokenizer.json, tokenizer_config.json, chat_template.jinja) with the
`tokenizers` library; token ids and chat texts equal those of transformers' AutoTokenizer, without importing it.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from miinb.errors import InvalidRequest, PromptTooLong

#: Prompt tokens that the detokenizer sees before the new ones: SentencePiece strips a space where a text begins.
CONTEXT_TOKENS = 6
#: A character of UTF-8 has so many bytes, and tokens, at most.
CHARACTER_TOKENS = 4
#: Tokens after which an incomplete character is given up.
MAX_HELD_TOKENS = 16
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextCodec:
    """One model's tokenizer and chat template. Safe to use from several threads.

    Attributes:
        max_token_bytes: the longest token's length: no text has fewer tokens than its bytes divided by it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: str | None,
        special_tokens: Mapping[str, Any],
        *,
        cleans: bool = False,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._template: jinja2.Template | None = None  # compiled when the first chat comes: it may be broken
        self._special_tokens = dict(special_tokens)
        self._cleans = cleans
        self._texts: dict[int, str] = {}
        self.max_token_bytes = max((len(token.encode()) for token in tokenizer.get_vocab()), default=1)

    @classmethod
    def load(cls, folder: Path) -> TextCodec:
        """The codec of a folder that `save_pretrained` of a fast tokenizer wrote."""
        config = read_json(folder / "tokenizer_config.json")
        specials = special_tokens({**read_json(folder / "special_tokens_map.json"), **config})
        tokenizer = read_tokenizer(folder, config)
        return cls(tokenizer, _chat_template(folder, config), specials, cleans=cleans_up(tokenizer, config))

    def encode(self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """Token ids of a text. Releases the interpreter lock, so that a long text can run in a thread.

        Raises:
            PromptTooLong: the text cannot have as few as `max_tokens` tokens (found before the tokenizer runs).
        """
        if max_tokens is not None and len(text) > max_tokens * self.max_token_bytes:
            raise PromptTooLong(
                f"The prompt has {len(text)} characters, but the model takes {max_tokens} tokens.",
                hint="Shorten the prompt.",
            )
        # The plain encode() holds the interpreter lock all the while.
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt of a chat, up to where the model answers.

        Raises:
            InvalidRequest: the model has no chat template, or the template refuses the messages.
        """
        if self._chat_template is None:
            raise InvalidRequest(
                "messages: this model has no chat template.",
                hint="Use generate() with a prompt, or start it with task='conversational' for a plain one.",
            )
        try:
            if self._template is None:
                self._template = _compile(self._chat_template)
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"messages: the model's chat template refuses them: {error}") from error
        except Exception as error:  # the template is the model's code: whatever it does is the request's failure alone
            raise InvalidRequest(
                f"messages: the model's chat template fails at them ({type(error).__name__})."
            ) from error

    def token_text(self, token_id: int) -> str:
        """The text of one token in the middle of others, special or not; a part of a character is U+FFFD."""
        found = self._texts.get(token_id)
        if found is None:
            once, twice = (self._tokenizer.decode([token_id] * n, skip_special_tokens=False) for n in (1, 2))
            found = self._texts[token_id] = twice[len(once) :]  # a first token may lose its space
        return found

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        """A detokenizer of the tokens that follow a prompt."""
        for size in range(CONTEXT_TOKENS, CONTEXT_TOKENS + CHARACTER_TOKENS):
            context = prompt_ids[-size:]
            if not self._tokenizer.decode(context).startswith(REPLACEMENT):
                break  # else it begins inside a character
        return Detokenizer(self._tokenizer, context, cleans=self._cleans)


class Detokenizer:
    """Turns one sequence's tokens into text as they come; special tokens are left out.

    Two offsets slide over the tokens: text is released once the window since the last release decodes to more than what
    was released and does not end inside a character. All pieces together equal the decoded whole. (`DecodeStream` of
    the tokenizers library keeps its unfinished tokens to itself, so the end of a cut sequence could not be shown.)
    With `cleans` the text is cleaned up, as `cleaned` does the whole.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = (), *, cleans: bool = False) -> None:
        self._cleaner = Cleaner() if cleans else None
        self._tokenizer = tokenizer
        self._window = list(context)
        self._read = len(self._window)  # tokens of the window whose text is released
        self._released = tokenizer.decode(self._window)

    def add(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete; may be empty."""
        text = self._add(ids)
        return self._cleaner.add(text) if self._cleaner else text

    def finish(self) -> str:
        """What is left: an incomplete character shows as U+FFFD."""
        text = self._release(self._tokenizer.decode(self._window))
        return self._cleaner.add(text) + self._cleaner.finish() if self._cleaner else text

    def _add(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode([*self._window, *ids])
        incomplete = text.endswith(REPLACEMENT)
        if incomplete and len(ids) > 1:  # to give up none of the characters before it
            return "".join(self._add([one]) for one in ids)
        self._window += ids
        if incomplete and len(self._window) - self._read <= MAX_HELD_TOKENS:
            return ""
        return self._release(text)

    def _release(self, text: str) -> str:
        new = text[len(self._released) :]
        if new:
            del self._window[: self._read]
            self._read = len(self._window)
            self._released = self._tokenizer.decode(self._window)
        return new


#: What the clean-up of older tokenizers takes away, in this order: spaces before punctuation and English endings.
_CLEANED = {" .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'"} | {
    f" {ending}": ending for ending in ("n't", "'m", "'s", "'ve", "'re")
}
#: The end of a text that what follows may make one of these.
_OPEN = re.compile(r" [ 'nvr.?!,]*\Z")
#: Where such an end can be cut all the same: none of these has, before a space, another end than a space, "'" or " n".
_CUT = re.compile(r"(?<=[^ '])(?<! n) ")


def cleans_up(tokenizer: Tokenizer, config: Mapping[str, Any]) -> bool:
    """Whether transformers cleans up the texts of a tokenizer: never those of BPE."""
    return bool(config.get("clean_up_tokenization_spaces")) and type(tokenizer.model).__name__ != "BPE"


def cleaned(text: str) -> str:
    """A text without the spaces that the clean-up takes away."""
    for found, instead in _CLEANED.items():
        text = text.replace(found, instead)
    return text


class Cleaner:
    """Cleans up a text that comes in pieces; holds back what may still change."""

    def __init__(self) -> None:
        self._held = ""

    def add(self, text: str) -> str:
        """The text to show now."""
        text = self._held + text
        opened = _OPEN.search(text)
        at = opened.start() if opened else len(text)
        at = max((cut.start() for cut in _CUT.finditer(text, at)), default=at)
        self._held = text[at:]
        return cleaned(text[:at])

    def finish(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return cleaned(held)


class StopFinder:
    """Finds the first of some stop strings in a text that comes in pieces; holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """The text to show now, and whether a stop string was found (it and what follows are cut off)."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=-1)
        if found >= 0:
            self._held = ""
            return text[:found], True
        keep = self._overlap(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """What was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[len(text) - size :]
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0


def read_tokenizer(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """The folder's tokenizer, with what tokenizer_config.json alone says of it."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
    return tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """The values of a JSON file; none if there is no file."""
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    template = file.read_text("utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens that a template may name (bos_token, eos_token, ...)."""
    found = {}
    for name, value in config.items():
        if name.endswith("_token") and value:
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[name] = text
    return found


class _Generation(jinja2.ext.Extension):
    """The {% generation %} block of templates made for training: its body, nothing more."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(template: str) -> jinja2.Template:
    """The template in a sandbox: it comes with the model, so it is not trusted."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # jinja2's own escapes HTML characters, which a prompt must not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
