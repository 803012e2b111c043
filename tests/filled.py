"""Messages with a value in every field that is not its default: what a wire forgets cannot come back by chance."""

from __future__ import annotations

import dataclasses
import itertools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from miinb.config import GenerationParams
from miinb.image_params import ImageParams

_T = TypeVar("_T")

#: What `GenerationParams` refuses together cannot all be set at once: two that set everything between them.
PARAMS = (
    GenerationParams(
        max_new_tokens=9,
        min_new_tokens=2,
        do_sample=True,
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        stop=["\n", "é"],
        seed=2**63 - 1,
        num_return_sequences=3,
        logprobs=4,
        ignore_eos=True,
        eos_token_id=[2, 3],
        logit_bias={7: -1.5},
        return_full_text=True,
        speculative=False,
    ),
    GenerationParams(num_beams=4, num_return_sequences=2, length_penalty=0.5, early_stopping="never"),
)


IMAGE_PARAMS = ImageParams(
    num_inference_steps=9,
    guidance_scale=2.5,
    height=40,
    width=24,
    negative_prompt="é\n",
    num_images_per_prompt=3,
    seed=2**63 - 1,
    scheduler="DDIMScheduler",
    image_format="webp",
    preview_steps=4,
    strength=0.5,
)


def filled(cls: type[_T], *, params: GenerationParams = PARAMS[0]) -> _T:
    """One of the class, made from its fields' types; no two plain values are equal."""
    made = _value(cls, itertools.count(3), params)
    for field in dataclasses.fields(made):
        assert getattr(made, field.name) != field.default, f"{cls.__name__}.{field.name} has its default"
    return typing.cast(_T, made)


def _value(kind: Any, numbers: Iterator[int], params: GenerationParams) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    number = next(numbers)
    if kind is GenerationParams:
        return params
    if kind is ImageParams:
        return IMAGE_PARAMS
    if dataclasses.is_dataclass(kind):
        types_ = typing.get_type_hints(kind)
        names = [field.name for field in dataclasses.fields(kind)]
        return kind(**{name: _value(types_[name], numbers, params) for name in names})
    if origin in (typing.Union, types.UnionType):
        return _value(parts[0], numbers, params)
    if origin is typing.Literal:
        return parts[0]
    if origin is tuple:
        inner = parts[:1] if parts[-1] is Ellipsis else parts
        return tuple(_value(part, numbers, params) for part in inner)
    if origin is Sequence:
        return [_value(parts[0], numbers, params)]
    if origin is Mapping:
        return {f"key {number}": _value(parts[1], numbers, params)}
    plain = {
        bytes: bytes([number]),
        int: number,
        float: number + 0.5,
        str: f"é {number}",
        bool: True,
        Any: f"any {number}",
    }
    return plain[kind]
