"""A notebook without its kernel: what papermill ran, nbconvert shows; results are there, and nothing in them runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import papermill
import pytest
from nbconvert import HTMLExporter, MarkdownExporter

from miinb.demo import tiny_model

HOSTILE = "<img src=x onerror='window.pwned=1'><script>window.pwned=1</script>"
CELLS = [
    "MODEL = None\nPROMPT = ''",
    "%load_ext miinb\nserved = %mii start {MODEL} --name paper --dtype fp32 --threads 1",
    "%mii gen {PROMPT} -n 6 --return-full-text",
    "await served.agenerate(PROMPT, max_new_tokens=3)",
    "panel = served.panel()\npanel.prompt.value = PROMPT\npanel.generate()\npanel.wait(60)\npanel.snapshot()",
    "served.bench([PROMPT], requests=3, new_tokens=4, warmup=0)",
    "%mii stop",
]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "in.ipynb")
    parameters = {"MODEL": str(tiny_model()), "PROMPT": HOSTILE}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")
        papermill.execute_notebook(
            folder / "in.ipynb", folder / "out.ipynb", parameters=parameters, progress_bar=False, cwd=folder
        )
    return folder / "out.ipynb"


def test_parameters_reach_the_magics(document: Path) -> None:
    notebook = nbformat.read(document, as_version=4)
    shown = [json.dumps(cell.get("outputs", [])) for cell in notebook.cells]
    assert re.search(r"\b6 tokens · first token", json.dumps(notebook.cells[3]["outputs"], ensure_ascii=False))
    assert "Stopped paper." in shown[-1]
    assert not [
        output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "error"
    ]


def test_no_widget_is_needed_to_read_it(document: Path) -> None:
    notebook = nbformat.read(document, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if "application/vnd.jupyter.widget-view+json" in output.get("data", {})]
    assert len(json.dumps(notebook.metadata.get("widgets", {}))) < 1_000_000
    assert document.stat().st_size < 500_000


def test_results_are_legible_and_their_text_is_no_markup(document: Path) -> None:
    html, _ = HTMLExporter().from_filename(str(document))
    state = r'<script type="application/vnd.jupyter.widget-state.json">.*?</script>'  # data, of the controls
    body = re.sub(state, "", html[html.index("<body") :], flags=re.DOTALL)
    assert "&lt;img src=x onerror=" in body
    assert not re.search(r"<(img src=x|script>window\.pwned)", body)
    assert "6 tokens · first token" in body
    assert "tokens/s" in body
    markdown, _ = MarkdownExporter().from_filename(str(document))
    assert "Stopped paper." in markdown
