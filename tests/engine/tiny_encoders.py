"""Tiny random encoders of every optimized family with every head, saved as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

#: Task: the ending of transformers' class.
HEADS = {
    "text-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "fill-mask": "ForMaskedLM",
    "feature-extraction": "Model",
}
BERT: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "id2label": {0: "a", 1: "b", 2: "c"},
}
ROBERTA = BERT | {"max_position_embeddings": 50, "type_vocab_size": 1, "pad_token_id": 1}
DISTILBERT = {
    "vocab_size": 101,
    "dim": 40,
    "hidden_dim": 72,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 48,
    "id2label": {0: "a", 1: "b", 2: "c"},
}
#: Name: the classes' prefix and what the configuration is given. Odd head sizes, untied decoders, offsets.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", BERT | {"type_vocab_size": 3, "layer_norm_eps": 1e-5}),
    "bert-untied": ("Bert", BERT | {"tie_word_embeddings": False, "hidden_act": "relu", "num_attention_heads": 1}),
    "roberta": ("Roberta", ROBERTA),
    "roberta-untied": (
        "Roberta",
        ROBERTA | {"tie_word_embeddings": False, "pad_token_id": 0, "hidden_act": "gelu_new"},
    ),
    "xlm-roberta": ("XLMRoberta", ROBERTA | {"num_attention_heads": 8}),
    "camembert": ("Camembert", ROBERTA | {"type_vocab_size": 2}),
    "distilbert": ("DistilBert", DISTILBERT),
    "distilbert-untied": ("DistilBert", DISTILBERT | {"tie_word_embeddings": False, "activation": "relu"}),
    "electra": ("Electra", BERT | {"embedding_size": 24}),
    "electra-wide": ("Electra", BERT | {"embedding_size": 40, "tie_word_embeddings": False}),
}


def build(name: str, task: str, folder: Path, changes: dict[str, Any] | None = None) -> Any:
    """The model of a row of `CONFIGS` with a task's head, saved to `folder`."""
    prefix, values = CONFIGS[name]
    values = values | (changes or {})
    torch.manual_seed(len(name))
    if task == "question-answering":
        values = {key: value for key, value in values.items() if key != "id2label"}
    config = getattr(transformers, f"{prefix}Config")(**values)
    model = getattr(transformers, prefix + HEADS[task])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model
