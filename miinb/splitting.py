"""Which models transformers runs split over several ranks, by DeepSpeed's AutoTP, and over how many; no torch.

AutoTP guesses from a model's module names which matrices to split by columns and which by rows. Where it guesses wrong
the model raises, or worse, answers wrongly: so only families whose logits and tokens on two ranks were those of one are
let through (tests/engine/test_autotp.py), and each start compares the split model with the whole one.
"""

from __future__ import annotations

from miinb.models import DTYPE_BYTES, ModelInfo

#: config.json's model_type of the families that AutoTP splits right.
DECODERS = (
    "apertus", "arcee", "biogpt", "codegen", "cohere", "cohere2", "ernie4_5", "exaone4", "falcon", "gemma",
    "gemma2", "gemma3_text", "glm", "glm4", "gpt_neo", "gpt_neox", "gptj", "granite", "llama", "mistral", "mpt",
    "nemotron", "olmo", "opt", "phi", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2", "xglm",
)  # fmt: skip
ENCODERS = ("albert", "bert", "distilbert", "electra", "roberta", "xlm-roberta")
#: What config.json of a family must say for that (an absent value reads as False).
_ONLY: dict[str, dict[str, bool]] = {
    "cohere": {"use_qk_norm": False},
    "falcon": {"new_decoder_architecture": True},
    "stablelm": {"qk_layernorm": False},
}
#: CodeGen's fused projection comes in blocks of this many, which AutoTP splits each.
_CODEGEN_BLOCKS = 4


def misfit(model: ModelInfo, ranks: int) -> str:
    """Why AutoTP does not split a model over so many ranks; "" if it does."""
    if model.family not in (*DECODERS, *ENCODERS):
        return f"DeepSpeed's AutoTP does not split {model.family}"
    for name, value in _ONLY.get(model.family, {}).items():
        if bool(model.config.get(name)) != value:
            return f"DeepSpeed's AutoTP splits {model.family} with {name}={value} alone"
    unit = ranks * (_CODEGEN_BLOCKS if model.family == "codegen" else 1)
    for name, number in (("attention heads", model.heads), ("key/value heads", model.kv_heads)):
        if not number or number % unit:
            return f"the {number} {name} of {model.source} do not divide by {unit}"
    return ""


def fitting(model: ModelInfo) -> list[int]:
    """The numbers of ranks over which AutoTP splits a model."""
    return [ranks for ranks in range(1, 65) if ranks == 1 or not misfit(model, ranks)]


def rank_bytes(model: ModelInfo, dtype: str, ranks: int) -> int:
    """About what each rank keeps of the weights: all of the embedding, its part of the rest."""
    embedding = model.vocab_size * model.hidden_size
    tied = bool(model.config.get("tie_word_embeddings", True))  # the head is split then, the embedding is not
    rest = max(0, model.parameters - embedding) + (embedding if tied else 0)
    return int((embedding + -(-rest // ranks)) * DTYPE_BYTES[dtype])
