"""CLIP's kind of tokenizer, made of its merges: for pipelines that bring none."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer


def clip_tokenizer(merges: Sequence[tuple[str, str]] = (), *, length: int) -> CLIPTokenizer:
    """A byte-level BPE.

    Its tokens are the bytes' letters, inside a word and at its end, then what each merge makes, then the two marks.

    Args:
        merges: pairs of pieces that become one, in their order; without any each letter is a token.
        length: tokens of a text, the two marks included.
    """
    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *(first + last for first, last in merges)]
    table = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))}
    return CLIPTokenizer(vocab=table, merges=list(merges), model_max_length=length)
