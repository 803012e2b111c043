"""Steps padded for CUDA graphs give the same tokens, without a GPU: see `interpreted_graphs.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from miinb.engine.graphs import capture_order, mixed_sizes

pytest.importorskip("triton")

PROMPTS = [[5, 9, 11, 60, 7], [4], [47, 3, 21, 8, 8, 40, 13, 2, 9, 5, 6, 7]]


def test_padded_steps_give_the_tokens_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        new = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, eos_token_id=-1
        )
        expected.append(new[0, len(prompt) :].tolist())
    program = str(Path(__file__).with_name("interpreted_graphs.py"))
    done = subprocess.run(
        [sys.executable, program, str(tmp_path), json.dumps(PROMPTS), "4"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["tokens"] == expected
    assert result["replays"] == result["steps"] > 4  # every step had a graph: of prompts, mixed, and of decoding


def test_the_largest_graph_is_captured_first_and_then_the_small() -> None:
    assert capture_order(1) == [1]
    assert capture_order(6) == [6, 1, 2, 4]
    assert capture_order(40) == [40, 1, 2, 4, 8, 16, 32]


def test_graphs_with_prompts_are_close_together_where_steps_are_short() -> None:
    assert mixed_sizes(64) == [32, 64]
    assert mixed_sizes(2048) == [32, 64, 128, 192, 256, 384, 512, 1024, 1536, 2048]
    assert mixed_sizes(8192) == mixed_sizes(2048)
