"""Tiny random encoders with trained tokenizers, and answers equal but for rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from miinb.server.encoders.request import Asked
from tests.server.encoders.by_model import ask

FAMILIES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "distilbert": "DistilBert"}


class Tiny:
    """A tiny random model of a family and head, its tokenizer and transformers' pipeline."""

    def __init__(self, folder: Path, kind: str, head: str, names: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, model_max_length=64)
        family = FAMILIES[kind]
        labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}} if names else {}
        torch.manual_seed(0)
        settings = getattr(transformers, f"{family}Config")(
            vocab_size=len(self.tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            hidden_dim=64,  # DistilBERT's name for it
            max_position_embeddings=80,
            pad_token_id=self.tokenizer.pad_token_id,
            **labels,
        )
        self.model = getattr(transformers, family + head)(settings).eval()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.dim() == 2:  # so that answers differ from token to token
                    parameter.normal_(std=0.1 if "layer." in name else 0.7)

    def save(self, folder: Path) -> Path:
        """Model and tokenizer as a checkpoint."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return folder

    def pipeline(self, task: str) -> Any:
        return transformers.pipeline(task, model=self.model, tokenizer=self.tokenizer, device="cpu")

    def ask(self, task: str, inputs: list[Any], names: tuple[str, ...] = (), **options: Any) -> Asked:
        info = {"labels": names, "vocab_size": len(self.tokenizer)}
        return ask(self.folder, task, inputs, info=info, **options)


def same(ours: Any, theirs: Any) -> None:
    """Equal but for rounding of scores."""
    if isinstance(theirs, list):
        assert len(ours) == len(theirs), (ours, theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
        return
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        if name == "score":
            assert ours[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6)
        else:
            assert ours[name] == value, (name, ours, theirs)
