from __future__ import annotations

import io
import json
import re
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from image_standin import ImageStandIn, landscape
from panel_checks import check_controls, html_of, nothing_left, until
from PIL import Image
from standin import StandIn

import miinb
from miinb.errors import QueueFull
from miinb.image_results import KEPT
from miinb.notebook import image_compare_panel, viewer
from miinb.notebook.compare_panel import ComparePanel
from miinb.notebook.image_compare_panel import ImageComparePanel
from miinb.notebook.panels import panel
from miinb.notebook.viewer import PairViewer

PROBE = "<img src=x onerror=alert(1)><script>alert(2)</script>\x1b[31m"
Make = Callable[..., tuple[ImageStandIn, ImageStandIn, ImageComparePanel]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    made: list[ImageComparePanel] = []

    def one(**of_second: Any) -> tuple[ImageStandIn, ImageStandIn, ImageComparePanel]:
        first = ImageStandIn(name="plain", e2e_s=0.9)
        second = ImageStandIn(**({"name": "swift", "e2e_s": 0.5} | of_second))
        text = StandIn(name="stories")
        monkeypatch.setitem(vars(miinb), "deployments", lambda: [one.status() for one in (first, second, text)])
        monkeypatch.setitem(vars(miinb), "attach", lambda name: second)
        made.append(panel(first, "compare"))
        made[-1].controls.num_inference_steps.value = 3
        return first, second, made[-1]

    yield one
    for shown in made:
        shown.close()


def compared(shown: ImageComparePanel, prompt: str = "a cat", count: int = 1) -> None:
    shown.prompt.value = prompt
    shown.controls.num_images_per_prompt.value = count
    shown.run.click()
    assert shown.wait(20)


def test_both_paint_the_same_request_and_the_faster_is_named(make: Make) -> None:
    first, second, shown = make(brighter=3)
    assert shown.second.options == ("plain", "swift")
    compared(shown)
    assert first.asked == second.asked
    assert "preview_steps" not in first.asked[0][1]
    assert "swift is 1.8x faster than plain." in shown.output.value
    assert "1.8x faster" in shown.status.value
    for what in ("text encoder", "steps", "VAE", "whole answer"):
        assert what in shown.output.value
    assert "the largest difference is 3 of 255" in shown.viewer.words.value
    for column, name in ((shown.left, "plain"), (shown.right, "swift")):
        assert name in column.value
        assert column.value.count("<img ") == 1
    shown.pin()
    html, text = shown._pins[0]
    assert html.count("<img ") == 2
    for words in ("1.8x faster", "the largest difference is 3 of 255"):
        assert words in html
        assert words in text
    check_controls(shown, 26)


def test_slower_and_equal_is_said_plainly(make: Make) -> None:
    _, _, shown = make(e2e_s=1.8)
    compared(shown)
    assert "swift is slower than plain: it takes 2.0x as long." in shown.output.value
    assert "The pictures are the same, pixel for pixel." in shown.viewer.words.value


def test_several_pictures_are_looked_at_one_by_one(make: Make) -> None:
    _, _, shown = make(brighter=1)
    shown.controls.lock.value, shown.controls.seed.value = True, 5
    compared(shown, count=3)
    assert shown.left.value.count("<img ") == 3
    assert shown.which.layout.display is None
    assert list(shown.which.options) == [("seed 5", 0), ("seed 6", 1), ("seed 7", 2)]
    before = shown.viewer.picture.value
    shown.which.value = 2
    assert shown.viewer.picture.value != before
    assert shown.snapshot().text.count("PSNR") == 3


def test_blind_sides_are_unlabeled_until_the_vote(make: Make) -> None:
    first, second, shown = make(brighter=1, step_s=0.01)
    shown.blind.value = True
    said: list[str] = []
    shown.status.observe(lambda change: said.append(change["new"]), "value")
    orders = set()
    for number in range(1, 40):
        compared(shown, f"prompt {number}")
        texts = [shown.left.value, shown.right.value, shown.output.value, shown.files.value, shown.snapshot().html]
        hidden = re.sub(r"base64,[^\"]*", "", "".join([*texts, *said, shown.viewer.picture.value]))
        for word in ("plain", "swift", "faster", "slower", "step "):
            assert word not in hidden
        assert "Left" in shown.left.value
        assert "PSNR" in shown.viewer.words.value
        shown.ballot["left"].click()
        said.clear()
        assert len(shown.votes) == number
        assert "swift is 1.8x faster than plain." in shown.status.value
        orders.add(shown.votes.iloc[-1]["winner"])
        if len(orders) == 2:
            break
    assert orders == {"plain", "swift"}
    assert first.asked == second.asked
    assert list(shown.votes.columns[:8]) == ["t", "prompt", "left", "right", "vote", "winner", "blind", "seed"]
    assert shown.votes["blind"].all()
    files = dict(re.findall(r'download="(\w+\.\w+)"[^>]*base64,([^"]*)"', shown.files.value))
    known = json.loads(b64decode(files["comparison.json"]))
    assert known["left"]["seeds"] == [known["parameters"]["seed"]]
    assert known["left"]["timing"]["steps_s"] > 0


def test_history_brings_the_pair_back(make: Make) -> None:
    _, _, shown = make()
    shown.controls.scheduler.value = "DDIMScheduler"
    compared(shown, "one")
    seed = shown.controls.seed.value
    shown.controls.scheduler.value = "(the model's)"
    compared(shown, "two", count=2)
    shown.previous.click()
    assert shown.prompt.value == "one"
    assert (shown.controls.scheduler.value, shown.controls.seed.value) == ("DDIMScheduler", seed)
    assert shown.which.layout.display == "none"
    shown.next.click()
    assert shown.which.layout.display is None


def test_old_pairs_make_room(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, shown = make(side=64)
    monkeypatch.setattr(image_compare_panel, "MOST_BYTES", 5000)
    for number in range(5):
        compared(shown, f"prompt {number}")
    assert 1 <= len(shown.history) < 5
    assert shown.history[-1].prompt == "prompt 4"
    assert shown.past.options[-1][0].endswith("prompt 4")


@pytest.mark.parametrize("together", [False, True])
def test_stop_ends_both(make: Make, together: bool) -> None:
    first, second, shown = make()
    first.gate = second.gate = threading.Event()
    shown.together.value = together
    shown.prompt.value = "a cat"
    shown.run.click()
    until(lambda: first.asked and (second.asked or not together))
    shown.halt.click()
    assert shown.wait(10)
    assert "no answers" in shown.status.value
    assert shown.ballot["left"].disabled
    assert len(second.asked) == together
    assert "Cancelled" not in shown.left.value + shown.right.value
    assert shown._looking.layout.display == "none"


def test_an_error_of_one_side_leaves_the_other(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    _, second, shown = make()

    async def refuse(*_: Any, **__: Any) -> None:
        raise QueueFull("1024 <requests> wait.", hint=f"1 of 2 pictures done. {KEPT}")

    monkeypatch.setattr(second, "agenerate", refuse, raising=False)
    compared(shown)
    assert "QueueFull: 1024 &lt;requests&gt; wait. 1 of 2 pictures done." in shown.right.value
    assert ".result" not in shown.right.value
    assert shown.left.value.count("<img ") == 1
    assert "an answer is missing" in shown.status.value
    assert shown.ballot["tie"].disabled
    shown.controls.negative.value, shown.controls.guidance_scale.value = "rain", 0
    compared(shown)
    assert "negative_prompt: acts only" in shown.status.value


def test_pictures_of_two_sizes_are_shown_and_said(make: Make) -> None:
    _, _, shown = make(side=64)
    compared(shown)
    assert "32 x 32 and 64 x 64 pixels cannot be compared" in shown.viewer.words.value
    assert "1.8x faster" in shown.output.value
    assert "cannot be compared" in shown.snapshot().text


def test_hostile_text_is_no_markup(make: Make) -> None:
    _, _, shown = make(name="<b>swift", brighter=1)
    compared(shown, PROBE)
    shown.pin()
    picture = r'<img( class="[\w-]+")? alt="[^"]*" style="[^"]*" src="data:image/\w+;base64,[^"]*">'
    html = re.sub(picture, "", html_of(shown))
    for markup in ("<img", "<script", "<b>swift"):
        assert markup not in html
    assert "\x1b" not in html_of(shown) + shown.snapshot().text


def test_the_task_chooses_the_panel_and_close_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = ImageStandIn(gate=threading.Event())
    monkeypatch.setitem(vars(miinb), "deployments", lambda: [alone.status()])
    text = panel(StandIn(), "compare")
    assert isinstance(text, ComparePanel)
    text.close()
    with nothing_left():
        shown = panel(alone, "compare")
        assert isinstance(shown, ImageComparePanel)
        assert "start another one" in shown.status.value
        shown.prompt.value = "a"
        shown.run.click()
        until(lambda: alone.asked)
        shown.close()


def test_the_viewers_views() -> None:
    one, two = landscape(1, 40, 24), landscape(1, 40, 24, brighter=9)
    looked = PairViewer(threading.RLock())
    looked.show((one, two), ("first", "second"))
    assert looked.picture.value.count("<img ") == 2
    looked.view.value = "slider"
    assert looked.position.layout.display is None
    assert 'alt="first left of 50%, second right of it"' in looked.picture.value
    looked.view.value = "in turns"
    data = b64decode(re.findall(r"base64,([^\"]*)", looked.picture.value)[0])
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 2
    looked.view.value = "difference"
    assert looked.gain.layout.display is None
    assert "4 times as bright" in looked.picture.value
    looked.gain.value = 16
    assert "16 times as bright" in looked.picture.value
    looked.show((one, one), ("first", "second"))
    assert looked.picture.value == ""
    looked.show((one, two.resize((24, 24))), ("first", "second"))
    assert looked.view.disabled
    assert looked.picture.value.count("<img ") == 2
    looked.close()


def test_a_slider_that_moves_fast_is_drawn_seldom_and_ends_where_it_is() -> None:
    looked = PairViewer(threading.RLock())
    looked.show((landscape(1, 64, 64), landscape(2, 64, 64)), ("first", "second"))
    looked.view.value = "slider"
    drawn: list[Any] = []
    looked.picture.observe(drawn.append, "value")
    began = time.monotonic()
    for place in range(101):
        looked.position.value = place
        time.sleep(0.002)
    until(lambda: "first left of 100%" in looked.picture.value)
    assert len(drawn) <= 2 + viewer._HZ * (time.monotonic() - began)
    looked.close()
