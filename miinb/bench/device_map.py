"""Hugging Face's own way over several GPUs: `device_map="auto"`, layers after one another on one GPU after the other.

`several_gpus` starts this as a process of its own, so that its memory is gone afterwards.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

#: Seconds that making the model and all its answers may take.
LIMIT_S = 400.0


def measure(folder: Path, dtype: str, *, prompt_tokens: int, new_tokens: int, repeats: int = 3) -> float:
    """Seconds a token of a model with random weights, spread over all GPUs that can be seen.

    Raises:
        RuntimeError: the process failed or took too long; the message has the end of what it said.
    """
    job = {"folder": str(folder), "dtype": dtype, "prompt": prompt_tokens, "new": new_tokens, "repeats": repeats}
    command = [sys.executable, "-m", "miinb.bench.device_map", json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"device_map='auto' took longer than {LIMIT_S:.0f} s.") from None
    if done.returncode:
        raise RuntimeError(f"device_map='auto' failed: {done.stderr[-500:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["token_s"])


def run(job: dict[str, Any]) -> float:
    """The median over the repeats of (time of all tokens - time of the first) / tokens between."""
    import torch
    import transformers
    from accelerate import dispatch_model, infer_auto_device_map

    dtype = getattr(torch, {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[job["dtype"]])
    settings = transformers.AutoConfig.from_pretrained(job["folder"], local_files_only=True)
    gpus = torch.cuda.device_count()
    with torch.device("cuda" if gpus else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=dtype).eval()
    if gpus > 1:  # as much on each: "auto" alone fills the first, and a model that fits there stays there
        share = int(model.get_memory_footprint() / gpus * 1.1) + (1 << 28)
        places = infer_auto_device_map(
            model, dict.fromkeys(range(gpus), share), no_split_module_classes=model._no_split_modules
        )
        model = dispatch_model(model, places)
    ids = torch.randint(3, settings.vocab_size, (1, job["prompt"]), device="cuda" if gpus else "cpu")

    def seconds(tokens: int) -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
            out.cpu()  # waits
        return time.perf_counter() - begin

    seconds(4)
    times = [(seconds(job["new"]) - seconds(1)) / (job["new"] - 1) for _ in range(job["repeats"])]
    return float(statistics.median(times))


if __name__ == "__main__":
    print(json.dumps({"token_s": run(json.loads(sys.argv[1]))}))
