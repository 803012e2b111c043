from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from stand_in import StandIn
from test_charts import words

from miinb.bench import ablation, charts, floor, presets
from miinb.config import DeploymentConfig
from miinb.errors import InvalidValue, MiinbError

STEPS: dict[str, dict[str, Any]] = {
    "baseline": {"engine": "baseline", "dtype": "fp32"},
    "fused": {"engine": "optimized", "options": {"prefix_cache": False, "cuda_graphs": False}},
    "prefix": {"options": {"prefix_cache": True}},
    "int8": {"dtype": "int8"},
}


class Served(StandIn):
    """Takes Session's arguments; each step answers in less time."""

    running: list[Served] = []  # noqa: RUF012
    most = 0

    def __init__(self, model: str, **arguments: Any) -> None:
        names = list(STEPS)
        super().__init__(arguments["engine"], name=f"s{len(self.running)}", token_s=0.008 / (1 + len(self.running)))
        self.arguments = arguments
        self.config = DeploymentConfig(model=model, **arguments)
        self.differs_from = 3 if len(self.running) == names.index("int8") else None
        Served.running.append(self)
        Served.most = max(Served.most, len(Served.running))

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        Served.running.remove(self)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> type[Served]:
    monkeypatch.setattr(ablation, "Session", Served)
    Served.running, Served.most = [], 0
    return Served


def test_each_step_stands_on_those_before() -> None:
    arms = ablation.ladder(STEPS)
    bare = {"prefix_cache": False, "cuda_graphs": False}
    assert arms["fused"] == {"engine": "optimized", "dtype": "fp32", "options": bare}
    assert arms["prefix"]["options"] == {"prefix_cache": True, "cuda_graphs": False}
    assert arms["int8"] == {**arms["prefix"], "dtype": "int8"}
    assert STEPS["prefix"] == {"options": {"prefix_cache": True}}  # what was given stays as it is


def test_a_ladder_is_measured_together_and_drawn_down_to_its_floor(
    served: type[Served], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ablation, "copy_bytes_s", lambda device: {"cpu": 1e12}[device])
    folder = str(presets.write("gpt2", tmp_path, **presets.tiny("gpt2")))
    steps = {**STEPS, "baseline": {**STEPS["baseline"], "load_format": "dummy"}}
    runs = ablation.ablation(folder, steps, requests=4, new_tokens=6, warmup=0, run="ladder", progress=_quiet)
    assert served.most == 4
    assert not served.running
    facts = next(iter(runs.env.values()))["arms"]
    assert list(facts) == list(STEPS)
    assert facts["prefix"]["adds"] == STEPS["prefix"]
    assert 0 < facts["int8"]["floor_s"] < (270 << 20) / 1e12
    table = ablation.table(runs)
    assert list(table["step"]) == list(STEPS)
    assert table["faster"].iloc[1] > 1
    assert table["in_all"].iloc[-1] == pytest.approx(table["faster"].iloc[1:].prod())
    assert table["of_floor"].iloc[-1] == pytest.approx(6 * facts["int8"]["floor_s"] / table["e2e_p50_s"].iloc[-1])
    assert list(table["equal_share"].iloc[1:]) == [1.0, 1.0, 0.5]
    text = words(charts.waterfall(runs)).replace("\n", " ")
    assert "the weights of int8 read once a token" in text
    assert "fused, prefix: all 4 answers are the same text as baseline's." in text


def test_what_cannot_be_measured_is_said_and_nothing_stays_running(
    served: type[Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidValue, match="two or more"):
        ablation.ablation("m", {"baseline": {}})
    with pytest.raises(MiinbError):
        ablation.ablation("m", STEPS, concurrency=0, floor=False, progress=_quiet)
    assert served.most == 4
    assert not served.running


def test_a_copy_that_cannot_be_measured_names_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, stdout="Warning: no figures\n")

    monkeypatch.setattr(floor.subprocess, "run", fail)
    with pytest.raises(MiinbError, match="copy on cuda could not be measured"):
        floor.copy_bytes_s("cuda")


def _quiet(*_: object) -> None:
    """No progress bar."""
