"""Trains the tiny model that ships inside the package: `python -m miinb.demo.train`, some minutes on one CPU core.

The folder that it writes is an ordinary Hugging Face one: llama architecture, byte-level BPE, a chat template. The text
comes from `stories.py`, so the model is the project's own work, free of other licenses.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from miinb.demo import TINY
from miinb.demo.stories import END, END_TURN, START_TURN, documents

SPECIAL = (END, START_TURN, END_TURN)  # token ids 0, 1, 2
CONTEXT = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(seed: int, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the grammar's text: any string goes in and comes out unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(islice(documents(seed), 4000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[START_TURN, END_TURN],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def make_model(vocab_size: int) -> LlamaForCausalLM:
    """The architecture: 3 layers of 128, 4 heads over 2 KV heads, tied embeddings."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=336,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.06,  # about 1 / sqrt(hidden_size): with the usual 0.02 attention hardly starts to learn
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[0, 2], pad_token_id=0)
    return model


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, rows: int, length: int) -> Iterator[torch.Tensor]:
    """Token ids [rows, length]: every row starts with a document's start, and is filled with more of them."""
    source = documents(seed)
    while True:
        packed = []
        for _ in range(rows):
            row: list[int] = []
            while len(row) < length:
                row += [*tokenizer(next(source))["input_ids"], 0]
            packed.append(row[:length])
        yield torch.tensor(packed)


def train(model: LlamaForCausalLM, data: Iterator[torch.Tensor], steps: int, peak_rate: float) -> float:
    """AdamW with warm-up and cosine decay; returns the mean loss (nats a token) of the last 20 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.05)
    losses: list[float] = []
    started = time.monotonic()
    for step in range(steps):
        rate = peak_rate * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = next(data)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {losses[-1]:.3f}  {time.monotonic() - started:.0f} s", flush=True)
    tail = losses[-20:]
    return sum(tail) / len(tail)


def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """The greedy continuation of a prompt (new text only)."""
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=120, do_sample=False)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: dict[str, Any]) -> None:
    """Write the Hugging Face folder with `provenance.json`, replacing an older one whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        new = Path(scratch) / "tiny"
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        (new / "provenance.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        new.chmod(0o755)
        for file in new.iterdir():  # safetensors writes 0600
            file.chmod(0o644)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)


def main() -> None:
    """Parse the command line, train, save, and show what the model says."""
    parser = argparse.ArgumentParser(prog="python -m miinb.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=TINY, help="folder to write")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--length", type=int, default=192, help="tokens of a row")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(args.seed, vocab_size=768)
    model = make_model(len(tokenizer))
    started = time.monotonic()
    loss = train(model, batches(tokenizer, args.seed, args.batch, args.length), args.steps, args.rate)
    wall_s = time.monotonic() - started
    model = model.to(torch.bfloat16).eval()
    prompts = (
        "Once upon a time,",
        "<|im_start|>user\nWhat is the capital of Japan?<|im_end|>\n<|im_start|>assistant\n",
    )
    facts = {
        "made_by": "python -m miinb.demo.train",
        "text": "miinb/demo/stories.py, a seeded grammar",
        "license": "MIT",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **{name: getattr(args, name) for name in ("seed", "steps", "batch", "length", "rate", "threads")},
        "loss": round(loss, 4),
        "train_s": round(wall_s),
        "parameters": model.num_parameters(),
        "dtype": "bfloat16",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "samples": {prompt: sample(model, tokenizer, prompt) for prompt in prompts},
    }
    save(args.out, model, tokenizer, facts)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
