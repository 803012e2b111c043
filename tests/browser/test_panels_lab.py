"""The panels in a real JupyterLab: what is asked, what comes, what is seen."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import Lab, Notebook
from playwright.sync_api import Page

from miinb.demo import tiny_encoder, tiny_model
from miinb.image_metadata import read_parameters
from tests.tiny_pipeline import make_pipeline

pytestmark = pytest.mark.browser

PROBE = "<img src=x onerror='window.pwned=1'><script>window.pwned=1</script>"
CELLS = [
    "%load_ext miinb\n"
    f"names = %mii start {tiny_encoder('token-classification')} --name names --threads 1\n"
    f"a = %mii start {tiny_model()} --name first --dtype fp32 --threads 1\n"
    f"b = %mii start {tiny_model()} --name second --dtype fp32 --threads 1 --engine baseline",
    "%mii panel encoder -d names",
    "%mii panel compare -d first",
    "%mii panel bench -d first",
    "card = %mii panel server -d second\ncard",
    "%mii stop --all",
    "print('views', card._view_count, 'looks', card._looker is not None)",
    "drawn = %mii start drawn/model --name drawn --threads 1",
    "%mii panel image -d drawn",
    "import time; time.sleep(5)",
]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    lab = Lab()
    try:
        lab.write("panels.ipynb", CELLS)
        make_pipeline(lab.folder / "drawn")
        yield lab
    finally:
        lab.close()


@pytest.fixture(scope="module")
def notebook(lab: Lab, page: Page) -> Iterator[Notebook]:
    notebook = Notebook(lab, page, "panels.ipynb")
    notebook.run(0)
    assert not [one for one in notebook.outputs(0) if one["output_type"] == "error"], notebook.text(0)
    yield notebook
    notebook.run(5)


def until(condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def picture(notebook: Notebook, tmp_path: Path, name: str) -> None:
    """What the panel looks like, for a person; kept where MIINB_PICTURES names a folder."""
    folder = Path(os.environ.get("MIINB_PICTURES", tmp_path))
    notebook.find("panel").screenshot(path=str(folder / f"{name}.png"))


def says(notebook: Notebook, words: str) -> Callable[[], bool]:
    return lambda: words in notebook.find("status").inner_text()


def test_entities_are_marked(notebook: Notebook, tmp_path: Path) -> None:
    notebook.run(1)
    notebook.find("panel").wait_for(timeout=30_000)
    notebook.find("text").locator("textarea").fill(f"Ada lives in London. {PROBE}")
    notebook.find("predict").click()
    until(says(notebook, "in all"), "no answer")
    assert "Ada lives in" in notebook.find("output").inner_text()
    assert "<script>window.pwned=1</script>" in notebook.find("output").inner_text()
    notebook.find("pin").click()
    until(lambda: "Ada lives in" in notebook.text(1), "nothing was pinned")
    picture(notebook, tmp_path, "encoder")
    tree = notebook.find("panel").aria_snapshot()
    for words in ('textbox "Text"', 'combobox "aggregation_strategy"', 'button "Predict"', "status:"):
        assert re.search(words.replace(' "', ' ".*'), tree), words  # an icon is part of a button's name
    assert notebook.page.evaluate("window.pwned") is None


def test_two_answers_stand_side_by_side_and_a_blind_vote_counts(notebook: Notebook, tmp_path: Path) -> None:
    notebook.run(2)
    notebook.find("compare").wait_for(timeout=30_000)
    notebook.find("prompt").locator("textarea").fill("Once upon a time")
    notebook.find("compare").click()
    until(lambda: "second is" in notebook.find("status").inner_text(), "no comparison", 60)
    assert "The answers" in notebook.find("output").inner_text()
    picture(notebook, tmp_path, "compare")
    notebook.find("blind").locator("input").check()
    notebook.find("prompt").locator("textarea").fill(f"Once {PROBE}")
    notebook.find("compare").click()
    until(says(notebook, "Which is better?"), "no blind comparison", 60)
    seen = notebook.find("left").inner_text() + notebook.find("right").inner_text()
    assert "first" not in seen
    picture(notebook, tmp_path, "compare-blind")
    notebook.find("vote-tie").click()
    until(says(notebook, "Your vote: tie"), "the vote was lost")
    assert notebook.page.evaluate("window.pwned") is None


def test_a_benchmark_draws_its_chart(notebook: Notebook, tmp_path: Path) -> None:
    notebook.run(3)
    notebook.find("run").wait_for(timeout=30_000)
    notebook.find("new-tokens").locator("input").fill("8")
    notebook.find("loads").locator("input").fill("1,2")
    notebook.find("requests").locator("input").fill("4")
    notebook.find("run").click()
    until(says(notebook, "Done: "), "no result", 90)
    assert "tokens/s" in notebook.find("output").inner_text()
    assert "tokens/s" in (notebook.find("chart").get_attribute("alt") or "")
    picture(notebook, tmp_path, "bench")


def test_the_server_card_restarts_its_deployment_and_stops_it(notebook: Notebook, tmp_path: Path) -> None:
    notebook.run(4)
    notebook.find("refresh").wait_for(timeout=30_000)
    assert "views 1 looks True" in notebook.run(6)[0]["text"]
    notebook.page.get_by_text("Logs", exact=True).last.click()
    until(lambda: "rank" in notebook.find("logs").inner_text(), "no logs")
    picture(notebook, tmp_path, "server")
    notebook.find("restart").click()
    until(lambda: "Phase:" in notebook.find("output").inner_text(), "no phases")
    until(says(notebook, "runs again"), "no restart", 90)
    notebook.find("stop").click()
    notebook.find("yes").click()
    until(says(notebook, "has stopped"), "it runs on", 60)
    picture(notebook, tmp_path, "server-stopped")
    assert notebook.find("stop").is_disabled()
    notebook.page.evaluate("window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    until(lambda: "views 0" in notebook.run(6)[0]["text"], "the front end counts no views")


@pytest.fixture(scope="module")
def painted(notebook: Notebook) -> Notebook:
    """The notebook with an image panel that has three pictures of a hostile prompt."""
    for index in (7, 8):
        notebook.run(index)
        assert not [one for one in notebook.outputs(index) if one["output_type"] == "error"], notebook.text(index)
    notebook.find("generate").wait_for(timeout=30_000)
    notebook.find("prompt").locator("textarea").fill(f"a cat {PROBE}")
    notebook.find("parameters-switch").click()
    notebook.find("num-inference-steps").locator("input").fill("900")
    notebook.find("scheduler").locator("select").select_option("DDIMScheduler")
    notebook.find("generate").click()
    until(lambda: "Step " in notebook.find("status").inner_text(), "no progress")
    until(lambda: notebook.find("preview").locator("img").count() == 1, "no preview")
    notebook.find("stop").click()
    until(says(notebook, "given up"), "Stop did not end it", 10)
    notebook.start(9)  # what is heard in the cell's thread comes late now: no field may be
    notebook.find("num-inference-steps").locator("input").fill("3")
    notebook.find("num-images-per-prompt").locator("input").fill("3")
    notebook.find("generate").click()
    until(says(notebook, "3 images"), "no pictures")
    notebook.ready()
    return notebook


def test_a_picture_is_chosen_made_again_and_compared(painted: Notebook, tmp_path: Path) -> None:
    choices = painted.page.locator(".miinb-choose:visible")
    assert choices.count() == 3
    thumb = painted.find("gallery").locator("img").nth(1)
    assert thumb.evaluate("image => image.naturalWidth") > 0
    box = thumb.bounding_box()
    assert box is not None
    painted.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)  # on the picture, not below it
    until(lambda: "Picture 2 " in painted.find("output").inner_text(), "a click on a picture does not choose it")
    choices.nth(2).focus()
    painted.page.keyboard.press("Enter")
    until(lambda: "Picture 3 " in painted.find("output").inner_text(), "a key does not choose it")
    painted.find("again").click()
    until(says(painted, "The same as picture 3, pixel for pixel"), "not the same")
    choices.nth(0).click()
    painted.find("comparing-switch").click()
    until(lambda: "PSNR" in painted.find("difference-words").inner_text(), "no numbers")
    painted.find("view").locator("select").select_option("slider")
    pair = painted.find("pair").locator("img").first
    until(lambda: "left of 50%" in (pair.get_attribute("alt") or ""), "no slider")
    painted.find("position").locator(".noUi-handle").focus()
    painted.page.keyboard.press("ArrowRight")
    until(lambda: "left of 51%" in (pair.get_attribute("alt") or ""), "the slider does not follow the keys")
    picture(painted, tmp_path, "image")
    painted.find("pin-two").click()
    until(lambda: "PSNR" in painted.text(8), "no comparison was pinned")
    assert painted.page.evaluate("window.pwned") is None


def test_a_picture_is_downloaded_taken_back_and_pinned(painted: Notebook) -> None:
    painted.find("make-files").click()
    for kind in ("png", "webp"):
        with painted.page.expect_download(timeout=10_000) as download:
            painted.find("panel").get_by_text(f"Save .{kind}").click()
        made = read_parameters(Path(download.value.path()).read_bytes())
        assert made.prompt == f"a cat {PROBE}"
        assert download.value.suggested_filename == f"{made.parameters['seed']}.{kind}"
    painted.find("prompt").locator("textarea").fill("")
    with painted.page.expect_file_chooser() as chooser:
        painted.find("upload").click()
    chooser.value.set_files({"name": "a.webp", "mimeType": "image/webp", "buffer": download.value.path().read_bytes()})
    until(says(painted, "its seed is locked"), "the file was not read")
    assert painted.find("prompt").locator("textarea").input_value() == made.prompt
    painted.find("pin").click()
    until(lambda: "> a cat <img" in painted.text(8), "nothing was pinned")
    (pinned,) = [one["data"] for one in painted.outputs(8) if "a cat" in str(one["data"].get("text/html"))]
    assert "application/vnd.jupyter.widget-view+json" not in pinned
    assert painted.page.evaluate("window.pwned") is None


def test_the_image_panel_is_labelled(painted: Notebook) -> None:
    tree = painted.find("panel").aria_snapshot()
    for words in ('textbox "Prompt"', 'combobox "scheduler"', 'button "Generate"', 'button "Same again"', "status:"):
        assert re.search(words.replace(' "', ' ".*'), tree), words
    assert re.search(r'img "a cat <img.* seed \d+"', tree)


def test_pinned_pictures_are_there_when_the_kernel_is_gone_and_the_notebook_opened_again(painted: Notebook) -> None:
    before = painted.outputs(8)  # a pair was pinned there already, of which the status may still speak
    painted.find("pin").click()
    until(lambda: painted.outputs(8) != before, "nothing was pinned")
    until(says(painted, "pinned below the panel"), "the pin is not told")
    pinned = painted.outputs(8)[-1]
    painted.save()
    painted.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    painted.open()
    assert painted.outputs(8)[-1] == pinned
    shown = painted.page.locator(".jp-RenderedHTMLCommon figure img").last
    shown.wait_for(timeout=10_000)
    until(lambda: shown.evaluate("image => image.naturalWidth") > 0, "the pinned picture is not seen")
    assert painted.page.evaluate("window.pwned") is None
