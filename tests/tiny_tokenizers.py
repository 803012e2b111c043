"""Small trained tokenizers, as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path

TEXT = [
    "Once upon a time there was a little fox who liked to count: one, two, three.",
    "The café was closed — naïve visitors waited. 日本語 текст 😀",
    "def main():\n    return {'a': 1}\n",
] * 20
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'tool' %}"
    "{{ raise_exception('no tools') }}{% endif %}"
    "<|{{ message['role'] }}|>\n{% generation %}{{ message['content'] | trim }}{% endgeneration %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def byte_level(folder: Path, *, bos: bool = False, chat: bool = True, vocab_size: int = 400) -> Path:
    """A byte-level BPE tokenizer (gpt2's kind); with `bos` it puts <s> before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return _save(tokenizer, folder, chat)


def sentence_piece(folder: Path) -> Path:
    """A BPE tokenizer of llama 2's kind: a space is ▁, unknown characters fall back to bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special[:3], show_progress=False)
    tokenizer.train_from_iterator(TEXT[:1], trainer)
    tokenizer.add_tokens(special[3:])
    return _save(tokenizer, folder, chat=False)


def _save(tokenizer: object, folder: Path, chat: bool) -> Path:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    if chat:
        fast.chat_template = TEMPLATE
    fast.save_pretrained(str(folder))
    return folder


def encoder_tokenizer(kind: str, folder: Path) -> Path:
    """An encoder's tokenizer: that of "bert" (WordPiece), "roberta" (byte-level BPE) or "xlm-roberta" (Unigram)."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

    if kind == "bert":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: object = trainers.WordPieceTrainer(vocab_size=160, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(TEXT, trainer)
        made = transformers.BertTokenizer(vocab=tokenizer.get_vocab())
    elif kind == "roberta":
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(TEXT, trainer)
        model = json.loads(tokenizer.to_str())["model"]
        merges = [tuple(pair) for pair in model["merges"]]
        mask = AddedToken("<mask>", lstrip=True, special=True)  # as that of the real ones
        made = transformers.RobertaTokenizer(vocab=model["vocab"], merges=merges, mask_token=mask)
    else:
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
        )
        tokenizer.train_from_iterator(TEXT, trainer)
        vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
        mask = AddedToken("<mask>", lstrip=True, special=True)
        made = transformers.XLMRobertaTokenizer(vocab=[tuple(entry) for entry in vocab], mask_token=mask)
    made.save_pretrained(str(folder))
    file = folder / "tokenizer_config.json"  # with what is in the class, as an exported folder has it
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_input_names": made.model_input_names}))
    return folder
