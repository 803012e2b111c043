"""Trains the tiny encoders that ship inside the package: `python -m miinb.demo.train_encoders`, minutes on one core.

One BERT (WordPiece, 2 layers of 64) learns to fill masks; classifiers of moods, entities and answers are trained from
its body. The text comes from `facts.py`, so the models are the project's own work, free of other licenses.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import random
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from miinb.demo import ENCODERS
from miinb.demo.facts import MOODS, TAGS, facts, opinion, vocabulary

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTEXT = 128
#: Steps of each head, after the body.
STEPS = {"fill-mask": 4000, "token-classification": 400, "text-classification": 200, "question-answering": 1500}
Batch = dict[str, torch.Tensor]


def make_tokenizer() -> Any:
    """WordPiece of the grammar's words, in BERT's form."""
    vocab = {word: index for index, word in enumerate([*SPECIAL, *vocabulary()])}
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **dict(zip(names, SPECIAL, strict=True)),
    )


def make_config(vocab_size: int, **more: Any) -> Any:
    """The architecture: 2 layers of 64, 4 heads."""
    return transformers.BertConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=CONTEXT,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.06,  # with the usual 0.02 a narrow model hardly starts to learn
        **more,
    )


def masked(tokenizer: Any, rng: random.Random, rows: int) -> Batch:
    """Facts and opinions with some words masked."""
    texts = [str(facts(rng)) if rng.random() < 0.8 else opinion(rng)[0] for _ in range(rows)]
    batch: Batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    ids = batch["input_ids"]
    chosen = (torch.rand(ids.shape) < 0.2) & (ids >= len(SPECIAL))
    batch["labels"] = ids.masked_fill(~chosen, -100)
    batch["input_ids"] = ids.masked_fill(chosen & (torch.rand(ids.shape) < 0.9), SPECIAL.index("[MASK]"))
    return batch


def tagged(tokenizer: Any, rng: random.Random, rows: int) -> Batch:
    """Facts with a tag for each word's pieces."""
    texts = [facts(rng) for _ in range(rows)]
    found = tokenizer([text.words for text in texts], is_split_into_words=True, padding=True, return_tensors="pt")
    labels = torch.full(found["input_ids"].shape, -100)
    for row, text in enumerate(texts):
        for place, word in enumerate(found.word_ids(row)):
            if word is not None:
                labels[row, place] = TAGS.index(text.tags[word])
    return {**found, "labels": labels}


def moods(tokenizer: Any, rng: random.Random, rows: int) -> Batch:
    """Opinions and their moods."""
    pairs = [opinion(rng) for _ in range(rows)]
    found = tokenizer([text for text, _ in pairs], padding=True, return_tensors="pt")
    return {**found, "labels": torch.tensor([mood for _, mood in pairs])}


def asked(tokenizer: Any, rng: random.Random, rows: int) -> Batch:
    """Questions on facts, and where the answers begin and end."""
    texts = [facts(rng) for _ in range(rows)]
    chosen = [rng.choice(text.questions) for text in texts]
    found = tokenizer(
        [question.split() for question, _ in chosen],
        [text.words for text in texts],
        is_split_into_words=True,
        padding=True,
        return_tensors="pt",
    )
    starts, ends = [], []
    for row, (_, (first, last)) in enumerate(chosen):
        words, kinds = found.word_ids(row), found.sequence_ids(row)
        mine = [place for place, kind in enumerate(kinds) if kind == 1 and first <= words[place] <= last]
        starts.append(mine[0])
        ends.append(mine[-1])
    return {**found, "start_positions": torch.tensor(starts), "end_positions": torch.tensor(ends)}


#: Of each task: transformers' class, what a batch is, and more of its configuration.
HEADS: dict[str, tuple[Any, Callable[[Any, random.Random, int], Batch], tuple[str, ...]]] = {
    "fill-mask": (transformers.BertForMaskedLM, masked, ()),
    "token-classification": (transformers.BertForTokenClassification, tagged, TAGS),
    "text-classification": (transformers.BertForSequenceClassification, moods, MOODS),
    "question-answering": (transformers.BertForQuestionAnswering, asked, ()),
}


def train(model: Any, batch: Callable[[], Batch], steps: int, rate: float) -> float:
    """AdamW with warm-up and cosine decay; returns the mean loss of the last 20 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    losses: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        loss = model(**batch()).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 200 == 0:
            print(f"step {step:5d}  loss {losses[-1]:.3f}", flush=True)
    return sum(losses[-20:]) / len(losses[-20:])


def main() -> None:
    """Train the body with the masks, then each head from it; save them all."""
    parser = argparse.ArgumentParser(prog="python -m miinb.demo.train_encoders", description=__doc__)
    parser.add_argument("--out", type=Path, default=ENCODERS, help="folder to write, one folder a task in it")
    parser.add_argument("--tasks", nargs="+", choices=HEADS, default=list(HEADS), help="heads (the body: fill-mask)")
    parser.add_argument("--steps", type=float, default=1.0, help="factor of the steps of every head")
    parser.add_argument("--rows", type=int, default=32, help="texts of a step")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    tokenizer, rng = make_tokenizer(), random.Random(args.seed)
    body: Any = None
    if "fill-mask" not in args.tasks:
        there = transformers.BertForMaskedLM.from_pretrained(args.out / "tiny-bert-fill-mask", dtype=torch.float32)
        body = there.bert.state_dict()
    for task in sorted(args.tasks, key=list(HEADS).index):
        kind, batch, labels = HEADS[task]
        named = dict(enumerate(labels))
        more = {"id2label": named, "label2id": {name: i for i, name in named.items()}} if labels else {}
        model = kind(make_config(len(tokenizer), **more))
        if body is not None:
            model.bert.load_state_dict(body, strict=False)
        started, steps = time.monotonic(), max(round(STEPS[task] * args.steps), 1)
        print(task, flush=True)
        loss = train(model, lambda make=batch: make(tokenizer, rng, args.rows), steps, args.rate)  # type: ignore[misc]
        body = copy.deepcopy(model.bert.state_dict()) if body is None else body
        known: dict[str, Any] = {
            "made_by": "python -m miinb.demo.train_encoders",
            "text": "miinb/demo/facts.py, a seeded grammar",
        }
        known |= {"license": "MIT", "date": datetime.datetime.now(datetime.UTC).date().isoformat()}
        known |= {"seed": args.seed, "steps": steps, "rows": args.rows, "rate": args.rate, "loss": round(loss, 4)}
        known |= {"train_s": round(time.monotonic() - started), "parameters": model.num_parameters()}
        save(args.out / f"tiny-bert-{task}", model, tokenizer, known)


def save(folder: Path, model: Any, tokenizer: Any, known: dict[str, Any]) -> None:
    """A Hugging Face folder in bf16, with `provenance.json`."""
    model.to(torch.bfloat16).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts_of_it = {
        "made_by": "python -m miinb.demo.train_encoders",
        "text": "miinb/demo/facts.py, a seeded grammar",
        "license": "MIT",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **known,
        "parameters": model.num_parameters(),
        "dtype": "bfloat16",
        **{name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }
    (folder / "provenance.json").write_text(json.dumps(facts_of_it, indent=2) + "\n", encoding="utf-8")
    for file in folder.iterdir():  # safetensors writes 0600
        file.chmod(0o644)
    print(json.dumps(facts_of_it, indent=2))


if __name__ == "__main__":
    main()
