from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from miinb.bench import charts, presets, published
from miinb.bench.records import Runs
from miinb.errors import InvalidValue
from miinb.models import inspect

PARAMETERS = {
    "gpt2": 124e6,
    "gpt2-xl": 1558e6,
    "bloom-560m": 559e6,
    "bloom-7b1": 7069e6,
    "opt-1.3b": 1316e6,
    "gpt-j-6b": 6051e6,
    "gpt-neox-20b": 20555e6,
    "llama-8b": 8030e6,
    "smollm2-135m": 134.5e6,
}


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_presets_are_configurations_that_the_model_reader_knows(name: str, tmp_path: Path) -> None:
    folder = presets.write(name, tmp_path / name)
    facts = inspect(folder, load_format="dummy")
    assert facts.family == presets.PRESETS[name]["model_type"]
    if name in PARAMETERS:
        assert facts.parameters == pytest.approx(PARAMETERS[name], rel=0.03)


def test_the_made_up_tokenizer_has_text_for_every_id() -> None:
    made = presets.tokenizer(400)
    assert made.get_vocab_size() == 400
    assert made.decode([300, 301]) == " w43 w44"
    assert made.decode(made.encode("héllo there").ids) == "héllo there"


def test_changes_are_checked(tmp_path: Path) -> None:
    folder = presets.write("llama-8b", tmp_path, num_hidden_layers=2)
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 2
    with pytest.raises(InvalidValue, match="no such field"):
        presets.write("llama-8b", tmp_path, n_layer=2)
    with pytest.raises(InvalidValue) as failure:
        presets.config("lama-8b")
    assert "llama-8b" in failure.value.hint


def measured(model: str) -> Runs:
    rows: list[dict[str, Any]] = [
        {
            "run_id": "r",
            "seq": i,
            "arm": arm,
            "model": model,
            "dtype": "fp16",
            "concurrency": 1,
            "prompt_tokens": 10,
            "output_tokens": 20,
            "e2e_s": s,
            "ttft_s": s / 20,
            "tpot_s": s / 20,
            "t_rel_s": i,
        }
        for i, (arm, s) in enumerate([("baseline", 0.12), ("optimized", 0.012)])
    ]
    return Runs(rows, {"r": {}})


def test_published_figures_stand_beside_measured_ones() -> None:
    both = published.beside(measured("openai-community/gpt2"))
    assert list(both["arm"]) == ["baseline", "optimized", "baseline (2022)", "MII public (2022)", "MII Azure (2022)"]
    assert both.set_index("arm").loc["MII public (2022)", "tpot_p50_s"] == pytest.approx(0.00354)
    ax = charts.latency(both, metric="tpot_s")
    assert len(ax.patches) == 5
    texts = " ".join(text.get_text() for text in ax.texts)
    assert "10.0x" in texts  # measured against measured
    assert "2.3x" in texts  # published against published: 8.30 / 3.54
    assert "other hardware" in texts
    with pytest.raises(InvalidValue, match="no figure of 'gtp2'") as failure:
        published.beside(measured("gtp2"))
    assert "gpt2" in failure.value.hint


@pytest.mark.parametrize(("module", "runs", "cannot"), [
    ("headline", "gpt2", "bert-base"), ("encoders", "bert-base", "gpt2"), ("headline.profile", "gpt2", "minilm")
])  # fmt: skip
def test_a_benchmark_offers_the_models_that_it_runs(
    module: str, runs: str, cannot: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"miinb.bench.{module}"
    main = importlib.import_module(name if "." in module else f"{name}.__main__").main
    with pytest.raises(SystemExit):
        main([cannot] if "." in module else ["--models", cannot])
    refused = capsys.readouterr().err
    assert f"invalid choice: '{cannot}'" in refused
    assert runs in refused.partition("choose from")[2]
    assert cannot not in refused.partition("choose from")[2]


def test_published_data_is_complete() -> None:
    assert len(published.latency()) == 96
    assert published.throughput()["azure_usd_per_mtok"].tolist() == [21, 42, 273, 170]
    assert isinstance(published.latency(), pd.DataFrame)
