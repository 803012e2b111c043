"""Tokenizers for encoders of public shapes: of the family's kind and size, the benchmark's English words as tokens.

A text of `workload.WORDS` then has about as many tokens as words, special tokens stand where the family puts them, and
the rest of the vocabulary is made up.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from miinb.bench.workload import WORDS

_BERT = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_ROBERTA = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "mask_token": "<mask>",
}


def word_piece(vocab_size: int) -> Any:
    """BERT's kind: WordPiece of lower-case words, [CLS] before a text and [SEP] behind each."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    known = [*_BERT.values(), *letters, *(f"##{letter}" for letter in letters), *sorted({*WORDS} - {*letters})]
    vocab = _filled(known, vocab_size)
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    made.add_special_tokens([AddedToken(token, special=True) for token in _BERT.values()])
    return made


def byte_bpe(vocab_size: int) -> Any:
    """RoBERTa's kind: byte-level BPE, <s> before a text, </s> behind it and </s></s> between two."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = list(dict.fromkeys(_ROBERTA.values()))
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, special_tokens=special[:-1], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([" " + " ".join(WORDS)], trainer)
    learned = json.loads(trained.to_str())["model"]
    by_id = sorted(learned["vocab"], key=lambda token: learned["vocab"][token])
    vocab = _filled(by_id, vocab_size - 1) | {"<mask>": vocab_size - 1}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(pair) for pair in learned["merges"]]))
    made.pre_tokenizer = trained.pre_tokenizer
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.RobertaProcessing(("</s>", vocab["</s>"]), ("<s>", vocab["<s>"]))
    made.add_special_tokens([AddedToken(token, special=True, lstrip=token == "<mask>") for token in special])
    return made


#: Families and what makes their tokenizer, with the names of its special tokens.
KINDS: dict[str, tuple[Callable[[int], Any], dict[str, str]]] = {
    "bert": (word_piece, _BERT),
    "distilbert": (word_piece, _BERT),
    "roberta": (byte_bpe, _ROBERTA),
}


def write(family: str, vocab_size: int, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json of a family's kind into a folder."""
    make, special = KINDS[family]
    made = make(vocab_size)
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **special}
    if family == "bert":
        settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    else:
        settings["model_input_names"] = ["input_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def _filled(known: list[str], vocab_size: int) -> dict[str, int]:
    """A vocabulary of exactly that size: the known tokens in order, then made-up ones."""
    words = [*known, *(f"<w{number}>" for number in range(vocab_size - len(known)))]
    if len(words) != vocab_size:
        raise ValueError(f"{len(known)} tokens do not fit a vocabulary of {vocab_size}")
    return {word: index for index, word in enumerate(words)}
