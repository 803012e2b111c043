"""A user's hour in a minute: a real JupyterLab, a real deployment, real clicks."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from lab import Lab, Notebook
from playwright.sync_api import Page

from miinb.demo import tiny_model

pytestmark = pytest.mark.browser

PROBE = "<img src=x onerror='window.pwned=1'><script>window.pwned=1</script>"
CELLS = [
    "%load_ext miinb",
    "slow = %mii start slow --name slow --load-format dummy --dtype fp32 --threads 1 --max-length 1024",
    "panel = slow.panel()\npanel",
    "%mii gen Hi -n 900 --ignore-eos",
    "print(slow.status().state, slow.status().in_flight)",
    f'r = %mii gen "{PROBE}" -n 3 --return-full-text\nfrom miinb.notebook import cards\ncards.pre("x")\nr',
    "import time; time.sleep(60)",
]
RESULT = [
    "import miinb\nfrom miinb.demo import tiny_model",
    "result = miinb.Session(tiny_model(), name='result', dtype='fp32', options={'threads': 1})",
    "pinned = result.panel()\npinned",
    "asked = result.panel()\nasked",
    """for panel, text in ((pinned, "Pinned <b>this</b>"), (asked, "Closed with this")):
    panel.controls.chat.value = panel is asked
    panel.controls.max_new_tokens.value = 6
    panel.prompt.value = text
    panel.generate()
    assert panel.wait(30)
pinned.pin()
shown = asked.snapshot()
pinned.close()
asked.close()
shown""",
]


def slow_model(folder: Path) -> None:
    """The tiny model's tokenizer with a configuration of so many layers that answers take seconds."""
    shutil.copytree(tiny_model(), folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 48, "max_position_embeddings": 1024}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    lab = Lab()
    try:
        slow_model(lab.folder / "slow")
        lab.write("session.ipynb", CELLS)
        yield lab
    finally:
        lab.close()


@pytest.fixture(scope="module")
def notebook(lab: Lab, page: Page) -> Notebook:
    notebook = Notebook(lab, page, "session.ipynb")
    notebook.run(0)
    notebook.run(1)
    notebook.run(2)
    notebook.find("panel").wait_for(timeout=30_000)
    return notebook


def until(condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def answered(notebook: Notebook, tokens: int) -> None:
    """Wait until an answer of so many tokens is complete; one that was stopped, or still grows, is another."""

    def is_complete() -> bool:
        status = notebook.find("status").inner_text()
        return status.startswith(f"{tokens} tokens") and "reached max_new_tokens" in status

    until(is_complete, f"no answer of {tokens} tokens")


def servers(lab: Lab) -> list[int]:
    """Processes of deployments whose state is in this lab's folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = " ".join(process.info["cmdline"] or [])
        if "miinb.server" in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            try:
                if process.environ().get("XDG_RUNTIME_DIR") == str(lab.folder / "run"):
                    found.append(process.pid)
            except psutil.Error:
                continue
    return found


def test_generate_grows_and_stop_ends_it(notebook: Notebook) -> None:
    notebook.page.get_by_text("Parameters", exact=True).click()
    notebook.find("max-new-tokens").locator("input").fill("900")
    notebook.find("prompt").locator("textarea").fill("Once upon a time")
    notebook.find("generate").click()
    output = notebook.find("output")
    until(lambda: len(output.inner_text()) > 20, "no text came")
    first = len(output.inner_text())
    until(lambda: len(output.inner_text()) > first, "the text did not grow")
    notebook.find("stop").click()
    until(lambda: "stopped" in notebook.find("status").inner_text(), "Stop did not end it", 15)
    assert notebook.find("generate").is_enabled()
    until(lambda: "ready 0" in notebook.run(4)[0]["text"], "the slot is not free")


def test_a_click_is_served_while_a_cell_runs(notebook: Notebook) -> None:
    notebook.start(6)
    notebook.find("max-new-tokens").locator("input").fill("5")
    notebook.find("generate").click()
    answered(notebook, 5)  # the click did not wait for the cell
    notebook.find("max-new-tokens").locator("input").fill("900")
    notebook.find("generate").click()
    until(lambda: len(notebook.find("output").inner_text()) > 20, "no text came")
    notebook.find("stop").click()
    until(lambda: "stopped" in notebook.find("status").inner_text(), "Stop waited for the cell", 15)
    assert notebook.prompt(6) == "[*]:"
    notebook.command("kernelmenu:interrupt")
    notebook.ready()


def test_pinned_answers_are_static_output_of_the_cell(notebook: Notebook) -> None:
    notebook.find("pin").click()
    until(lambda: "> Once upon a time" in notebook.text(2), "nothing was pinned")
    (pinned,) = [one["data"] for one in notebook.outputs(2) if "Once upon" in str(one["data"].get("text/html"))]
    assert "application/vnd.jupyter.widget-view+json" not in pinned


def test_text_of_a_model_is_no_markup(notebook: Notebook) -> None:
    notebook.find("prompt").locator("textarea").fill(PROBE)
    notebook.find("max-new-tokens").locator("input").fill("6")
    notebook.find("generate").click()
    answered(notebook, 6)
    notebook.find("pin").click()
    until(lambda: "> <img" in notebook.text(2), "nothing was pinned")
    notebook.run(5)
    assert "<img" in notebook.text(5)
    notebook.page.wait_for_timeout(200)  # a picture that is not there fails in a moment
    assert notebook.page.evaluate("window.pwned") is None


def test_an_answer_is_downloaded(notebook: Notebook) -> None:
    for kind in ("txt", "json"):
        with notebook.page.expect_download(timeout=10_000) as download:
            notebook.find("panel").get_by_text(f"Save .{kind}").click()
        assert download.value.suggested_filename == f"answer.{kind}"
    known = json.loads(Path(download.value.path()).read_text())
    assert known["request"] == PROBE
    assert known["usage"]["output_tokens"] == 6


def test_a_conversation_grows_and_begins_anew(notebook: Notebook) -> None:
    notebook.find("chat").locator("input").check()
    for place, text in enumerate(("First", PROBE)):
        notebook.find("max-new-tokens").locator("input").fill(str(7 + place))
        notebook.find("prompt").locator("textarea").fill(text)
        notebook.find("generate").click()
        answered(notebook, 7 + place)
        until(lambda: notebook.find("prompt").locator("textarea").input_value() == "", "the prompt stays", 15)
    assert "First" in notebook.find("conversation").inner_text()
    assert PROBE in notebook.find("asked").inner_text()
    boxes = [notebook.find(css).bounding_box()["y"] for css in ("conversation", "asked", "output", "prompt")]
    assert boxes == sorted(boxes)
    notebook.find("clear").click()
    until(lambda: not notebook.find("output").inner_text().strip(), "the conversation stays")
    assert notebook.find("conversation").inner_text() == ""
    notebook.find("chat").locator("input").uncheck()
    assert notebook.page.evaluate("window.pwned") is None


def test_a_panel_works_when_the_page_was_loaded_again(notebook: Notebook) -> None:
    notebook.find("previous").click()
    output = notebook.find("output")
    until(lambda: PROBE in notebook.find("asked").inner_text(), "the history does not answer")
    before, asked = output.inner_text(), notebook.find("asked").inner_text()
    notebook.save()
    notebook.open()
    notebook.find("panel").wait_for(timeout=30_000)
    assert (output.inner_text(), notebook.find("asked").inner_text()) == (before, asked)
    notebook.find("prompt").locator("textarea").fill("Again")
    notebook.find("generate").click()
    until(lambda: "Again" in notebook.find("asked").inner_text(), "nobody answers the click")
    until(lambda: "in all" in notebook.find("status").inner_text(), "no answer")
    assert asked in notebook.find("conversation").inner_text()
    notebook.find("chat").locator("input").uncheck()
    until(lambda: "Clear" in notebook.find("clear").inner_text(), "the panel stays a chat")


def test_stop_button_of_the_notebook_ends_the_cell_and_not_the_server(notebook: Notebook, lab: Lab) -> None:
    before = servers(lab)
    notebook.start(3)
    until(lambda: "tokens ·" in notebook.text(3), "no text came")
    notebook.command("kernelmenu:interrupt")
    until(lambda: "Interrupted" in notebook.text(3), "the cell went on")
    notebook.ready()
    assert "interrupted after" in notebook.text(3)
    until(lambda: "ready 0" in notebook.run(4)[0]["text"], "the slot is not free")
    assert servers(lab) == before


def test_controls_are_labelled(notebook: Notebook) -> None:
    tree = notebook.find("panel").aria_snapshot()
    names = ("Generate", "Stop", "Regenerate", "Clear", "Pin")
    assert not [name for name in names if not re.search(f'- button ".*{name}"', tree)]
    for text in ('textbox "Prompt"', 'combobox "Deployment"', 'spinbutton "max_new_tokens"', "status:"):
        assert text in tree


def test_the_keyboard_reaches_every_control(notebook: Notebook) -> None:
    page = notebook.page
    notebook.find("prompt").locator("textarea").focus()
    seen = []
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.innerText?.trim() || document.activeElement.type"))
        if seen[-1] == "Parameters":
            break
    names = ["Generate", "Regenerate", "Clear", "Pin", "Save .txt", "Save .json", "Parameters"]
    assert [name for name in seen if name in names] == names
    was = notebook.find("max-new-tokens").is_visible()
    page.keyboard.press("Space")
    until(lambda: notebook.find("max-new-tokens").is_visible() != was, "the parameters cannot be folded")
    notebook.find("prompt").locator("textarea").fill("By keys alone")
    notebook.find("generate").focus()
    page.keyboard.press("Enter")
    until(lambda: "Waiting" in (said := notebook.find("status").inner_text()) or "tokens" in said, "nobody answers")
    until(lambda: "in all" in notebook.find("status").inner_text(), "no answer")


def test_after_a_restart_of_the_kernel_no_process_is_left(notebook: Notebook, lab: Lab) -> None:
    assert servers(lab)
    notebook.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.restartKernel()")
    until(lambda: not servers(lab), "processes are left", 15)
    assert not list((lab.folder / "run" / "miinb").iterdir())


def test_results_stay_when_the_kernel_is_gone_and_the_notebook_opened_again(lab: Lab, page: Page) -> None:
    lab.write("result.ipynb", RESULT)
    notebook = Notebook(lab, page, "result.ipynb")
    for index in range(len(RESULT)):
        notebook.run(index)
    shown = [notebook.text(index) for index in (2, 3, 4)]
    notebook.save()
    page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    notebook.open()
    assert [notebook.text(index) for index in (2, 3, 4)] == shown
    seen = page.locator(".jp-Notebook").inner_text()
    assert "Pinned <b>this</b>" in seen
    assert seen.count("Closed with this") == 3  # the source, what the panel left, and the snapshot
    assert "widget" not in seen.lower()
