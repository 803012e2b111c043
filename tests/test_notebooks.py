"""The notebooks run from top to bottom, and what is committed comes from a real run on a named machine."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import miinb
from miinb.demo import MODEL_VARIABLE, tiny_model

FOLDER = Path(__file__).parent.parent / "notebooks"
#: Smaller than a reader's, set after the parameters cell.
SMALL = {
    "01_first_answer.ipynb": "NEW_TOKENS = 8",
    "02_playground.ipynb": "NEW_TOKENS = 8",
    "03_benchmark.ipynb": (
        "REQUESTS, NEW_TOKENS, CONCURRENCY, SWEEP_LIMIT = 2, 8, [1, 2], 2; PROMPT_RANGE = NEW_RANGE = (8, 16)"
    ),
    "04_what_made_it_fast.ipynb": "REQUESTS, NEW_TOKENS, WITHOUT = 4, 8, ['prefix', 'bf16']",
    "05_encoders.ipynb": "REQUESTS, CONCURRENCY, TINY, SHAPES = 4, [1, 2], True, ['bert-base']",
    "06_images.ipynb": "STEPS, REQUESTS, BATCHES = 4, 2, [1, 2]; LOSSY.pop('int8')",
    "07_several_gpus.ipynb": "SHAPE, NEW_TOKENS, REQUESTS, STREAM_TOKENS = None, 8, 2, 400",
    "08_fewer_bytes.ipynb": "NEW_TOKENS, TIMED_TOKENS, REPEATS, TEXT_TOKENS, FIT = 4, 4, 2, 256, 1_000",
}
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def test_all_notebooks_are_tested() -> None:
    assert sorted(SMALL) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODEL_VARIABLE, str(tiny_model()))
    notebook = nbformat.read(FOLDER / name, as_version=4)
    tagged = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    notebook.cells.insert(tagged[0] + 1, nbformat.v4.new_code_cell(SMALL[name]))
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert notebook.cells[-1].outputs[-1]["data"]["text/plain"] == "[]"  # it ended what it started
    started = {"first", "play", "plain", "fast", "fill", "ner", "qa", "vectors", "small", "offloaded", "copies"}
    started |= {"paint", "lossy-0", "lossy-1"}
    assert not started & {deployment.name for deployment in miinb.deployments()}


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_are_of_one_run_from_top_to_bottom(name: str) -> None:
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(bool(cell.outputs) for cell in code) > len(code) / 2
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert "cores of" in notebook.cells[0].source  # the machine is named
    assert (FOLDER / name).stat().st_size < 1_000_000
