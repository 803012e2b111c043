"""The benchmark of a start: files that both engines can read, and a run with the phases of each start."""

from __future__ import annotations

from pathlib import Path

import pytest

from miinb import checkpoint, models
from miinb.bench import presets, startup, store


def test_a_written_checkpoint_is_one(tmp_path: Path) -> None:
    folder = presets.write("gpt2", tmp_path, n_layer=2, n_embd=64, n_head=2, vocab_size=300)
    size = startup.write_checkpoint(folder, shard_bytes=100_000)
    files = checkpoint.safetensors_files(folder)
    assert len(files) > 1
    entries = [entry for file in files for entry in checkpoint.read_safetensors(file)]
    assert sum(entry.size_bytes for entry in entries) == size
    assert "lm_head.weight" not in {entry.name for entry in entries}  # it is tied
    assert models.inspect(folder).parameters == size // 2
    startup.drop_page_cache(folder)
    assert startup.read_s(folder) > 0


@pytest.mark.timeout(400)
def test_a_run_has_two_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # is put back afterwards
    tiny = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 300}
    fields = [part for name, value in tiny.items() for part in ("--set", f"{name}={value}")]
    fields += ["--set", "num_attention_heads=4", "--set", "num_key_value_heads=2"]
    startup.main(["--model", "smollm2-135m", "--device", "cpu", "--out", str(tmp_path), *fields])
    runs = store.load(tmp_path)
    assert list(runs.requests["arm"]) == ["cold", "warm"]
    (env,) = runs.env.values()
    for facts in env["arms"].values():
        assert {"start", "load", "verify"} <= set(facts["phases_s"])
        assert sum(facts["phases_s"].values()) < facts["ready_s"]
    assert "kernel cache" in capsys.readouterr().out
