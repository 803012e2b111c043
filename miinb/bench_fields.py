"""Fields of a benchmark that a user may write in several ways: lengths, objectives, numbers of pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from miinb.errors import InvalidValue, did_you_mean
from miinb.frozen import Frozen, InvalidValueError

#: A number of tokens, or the least and the most of them.
Tokens = int | tuple[int, int]
MAX_TOKENS = 1 << 20
#: What a service-level objective can bound, and the column of a request that has it.
OBJECTIVES = {"ttft": "ttft_s", "tpot": "tpot_s", "e2e": "e2e_s"}
#: What others call them.
_OTHER_NAMES = {"e2el": "e2e", "latency": "e2e", "total": "e2e", "itl": "tpot", "time_to_first_token": "ttft"}


def number_list(value: object) -> object:
    """[4] of 4; tuples as lists."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [value]
    return list(value) if isinstance(value, tuple) else value


class PictureFields(Frozen):
    """What each request of a benchmark of text-to-image asks for, by diffusers' names; see `ImageParams` for limits.

    Attributes:
        num_images_per_prompt: pictures of one request, which are computed together; several numbers are a point each.
    """

    num_images_per_prompt: Annotated[list[Annotated[int, Field(ge=1)]], BeforeValidator(number_list)] = [1]  # noqa: RUF012
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None
    scheduler: str | None = None


def read_tokens(value: object, name: str) -> Tokens:
    """A number of tokens, or a range of them: 128, "128", "64-512", (64, 512)."""
    parts: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    if isinstance(value, str):
        parts = value.split("-")
    try:
        numbers = [int(part) if isinstance(part, str) else part for part in parts]
    except ValueError:
        numbers = []
    whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
    if len(numbers) not in (1, 2) or not whole:
        raise InvalidValueError(f'{name}: give a number of tokens or a range ("64-512" or (64, 512)), not {value!r}')
    if not all(1 <= number <= MAX_TOKENS for number in numbers):
        raise InvalidValueError(f"{name}: 1 to {MAX_TOKENS} tokens, not {value!r}")
    if len(numbers) == 1 or numbers[0] == numbers[1]:
        return int(numbers[0])
    low, high = numbers
    if low > high:
        raise InvalidValueError(f'{name}: the range {low}-{high} is the wrong way round; give "{high}-{low}"')
    return low, high


def fewest(tokens: Tokens) -> int:
    """The number itself, or the low end of a range."""
    return tokens if isinstance(tokens, int) else tokens[0]


def most(tokens: Tokens) -> int:
    """The number itself, or the high end of a range."""
    return tokens if isinstance(tokens, int) else tokens[1]


def read_slo(value: object) -> dict[str, float] | None:
    """Objectives in seconds by name, of "ttft=0.5,tpot=0.05" or a mapping.

    Raises:
        InvalidValue: there is no such objective (the near name is in the hint), or a limit is not above 0.
    """
    if value is None:
        return None
    if isinstance(value, str):
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        value = {name.strip(): text.strip() for name, _, text in pairs}
    if not isinstance(value, Mapping) or not value:
        raise InvalidValue("slo: give limits in seconds.", hint='slo="ttft=0.5,tpot=0.05,e2e=2"')
    return {_objective(str(name)): _limit(str(name), limit) for name, limit in value.items()}


def _objective(name: str) -> str:
    plain = name.removesuffix("_s")
    if plain in OBJECTIVES:
        return plain
    meant = _OTHER_NAMES.get(plain)
    hint = f"Use {meant}." if meant else did_you_mean(plain, OBJECTIVES)
    raise InvalidValue(f"slo: there is no objective {name!r}.", hint=hint)


def _limit(name: str, value: object) -> float:
    try:
        limit = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        limit = math.nan
    if isinstance(value, bool) or not math.isfinite(limit) or limit <= 0:
        raise InvalidValue(f"slo: {name} needs a number of seconds above 0, not {value!r}.")
    return limit


def slo_words(slo: Mapping[str, float]) -> str:
    """Objectives in words: "TTFT at most 500 ms, total at most 2 s"."""
    names = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "total"}
    return ", ".join(f"{names[name]} at most {_seconds(limit)}" for name, limit in slo.items())


def _seconds(limit: float) -> str:
    return f"{limit:g} s" if limit >= 1 else f"{limit * 1e3:g} ms"
