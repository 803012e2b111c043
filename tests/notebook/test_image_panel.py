from __future__ import annotations

import asyncio
import io
import json
import re
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import ipywidgets as W
import numpy as np
import pytest
from image_standin import ImageStandIn, jpeg, landscape
from panel_checks import KINDS, check_controls, html_of, nothing_left, until, walk
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from standin import StandIn

import miinb
from miinb.errors import Cancelled, DeadlineExceeded, InvalidRequest, InvalidValue, QueueFull
from miinb.image_messages import ImagesProgress
from miinb.image_metadata import encoded
from miinb.image_results import KEPT
from miinb.notebook import gallery, work_panel
from miinb.notebook.image_panel import ImagePanel
from miinb.notebook.panels import panel

PROBE = "<img src=x onerror=alert(1)><script>alert(2)</script>\x1b[31m"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
Make = Callable[..., tuple[ImageStandIn, ImagePanel]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    made: list[ImagePanel] = []
    running: list[Any] = []
    monkeypatch.setitem(vars(miinb), "deployments", lambda: [one.status() for one in running])
    monkeypatch.setitem(vars(miinb), "attach", lambda name: next(one for one in running if one.name == name))

    def one(*others: Any, **fields: Any) -> tuple[ImageStandIn, ImagePanel]:
        session = ImageStandIn(**fields)
        running.extend([session, *others])
        made.append(panel(session))
        made[-1].controls.num_inference_steps.value = 4
        return session, made[-1]

    yield one
    for shown in made:
        shown.close()


def generated(shown: ImagePanel, prompt: str = "a cat", count: int = 1) -> None:
    shown.prompt.value = prompt
    shown.controls.num_images_per_prompt.value = count
    shown.run.click()
    assert shown.wait(20)


def cells(shown: ImagePanel) -> list[Any]:
    """The buttons of the thumbnails that are seen."""
    return [cell.choose for cell in shown.gallery._cells if cell.box.layout.display is None]


def test_pictures_come_into_the_gallery_and_one_is_shown_with_its_parameters(make: Make) -> None:
    session, shown = make()
    assert shown._acts.layout.display == "none"
    shown.controls.negative.value = "rain"
    generated(shown, count=3)
    (prompt, parameters) = session.asked[0]
    seed = shown.controls.seed.value
    assert prompt == "a cat"
    assert parameters == {
        "num_inference_steps": 4,
        "guidance_scale": 7.5,
        "negative_prompt": "rain",
        "num_images_per_prompt": 3,
        "seed": seed,
        "preview_steps": 4,
    }
    assert [picture.seed for picture in shown.pictures] == [seed, seed + 1, seed + 2]
    assert [button.description for button in cells(shown)] == [f"{i + 1} · {seed + i}" for i in range(3)]
    assert "3 images · 510 ms in all" in shown.status.value
    for words in ("a cat", "rain", f"Picture 1 · seed {seed}", "32 x 32", "tiny"):
        assert words in shown.output.value
    assert shown.chosen is shown.pictures[0]
    assert shown.chosen.image.getpixel((0, 0)) == landscape(seed, 32, 32).getpixel((0, 0))
    assert shown.result is not None
    cells(shown)[2].click()
    assert shown.chosen is shown.pictures[2]
    assert f"Picture 3 · seed {seed + 2}" in shown.output.value
    assert [button.icon for button in cells(shown)] == ["", "", "check"]


def test_same_again_is_the_same_and_variations_are_others(make: Make) -> None:
    session, shown = make()
    shown.controls.size.value = "512 x 768"
    generated(shown)
    first = shown.chosen
    assert first is not None
    shown.controls.size.value, shown.prompt.value = "(the model's)", "something else"
    shown.again.click()
    assert shown.wait(20)
    assert "The same as picture 1, pixel for pixel" in shown.status.value
    assert session.asked[1] == (
        "a cat",
        {
            "num_inference_steps": 4,
            "guidance_scale": 7.5,
            "width": 512,
            "height": 768,
            "seed": first.seed,
            "preview_steps": 4,
        },
    )
    session.brighter = 2
    shown.again.click()
    assert shown.wait(20)
    assert "Not quite picture 2: PSNR" in shown.status.value
    shown.count.value = 2
    shown.vary.click()
    assert shown.wait(20)
    prompt, varied = session.asked[3]
    assert prompt == "a cat"
    assert varied["num_images_per_prompt"] == 2
    assert varied["seed"] == first.seed + 1
    assert varied["height"] == 768
    assert len(shown.pictures) == 5
    shown.gallery.choose(shown.pictures[0])
    shown.vary.click()
    assert shown.wait(20)
    assert session.asked[4][1]["seed"] == first.seed + 3  # the gallery has those before


def test_the_seed_is_new_unless_it_is_locked(make: Make) -> None:
    session, shown = make()
    generated(shown)
    generated(shown)
    shown.controls.lock.value = True
    generated(shown)
    shown.controls.draw.click()
    generated(shown)
    first, second, third, fourth = (parameters["seed"] for _, parameters in session.asked)
    assert first != second == third != fourth


def test_use_parameters_brings_a_picture_back_to_the_controls(make: Make) -> None:
    session, shown = make()
    controls = shown.controls
    controls.scheduler.value, controls.image_format.value = "DDIMScheduler", "webp"
    controls.size.value, controls.width.value, controls.height.value = "another", 64, 40
    controls.negative.value = "rain"
    generated(shown)
    asked = session.asked[0]
    controls.load({})
    assert (controls.size.value, controls.scheduler.value, controls.negative.value) == ("(the model's)",) * 2 + ("",)
    shown.prompt.value = ""
    shown.take.click()
    assert controls.lock.value
    shown.run.click()
    assert shown.wait(20)
    assert session.asked[1] == asked


def test_progress_and_previews_are_shown_while_it_works(make: Make) -> None:
    session, shown = make(gate=threading.Event(), preview=jpeg(), step_s=0.03)
    shown.controls.num_inference_steps.value, shown.controls.preview_steps.value = 20, 1
    shown.prompt.value = "a cat"
    steps: list[int] = []
    previews: list[str] = []
    shown._progress.bar.observe(lambda change: steps.append(change["new"]), "value")
    shown._progress.preview.observe(lambda change: previews.append(change["new"]), "value")
    shown.run.click()
    assert shown.run.disabled
    assert not shown.halt.disabled
    assert shown._progress.box.layout.display is None
    assert session.gate is not None
    session.gate.set()
    assert shown.wait(20)
    assert steps == sorted(steps)
    assert 2 <= len(steps) <= 2 + 5 * 20 * 0.1
    assert "Preview at step" in previews[0]
    assert "data:image/jpeg" in previews[0]
    assert shown._progress.preview.value == ""
    assert shown._progress.box.layout.display == "none"


def test_late_progress_of_a_request_that_was_given_up_is_not_shown_as_that_of_the_next(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, shown = make(gate=threading.Event())
    told: list[Callable[[ImagesProgress], object]] = []
    ask = session.agenerate

    def agenerate(prompt: str, **options: Any) -> Any:
        told.append(options["on_progress"])
        return ask(prompt, **options)

    monkeypatch.setattr(session, "agenerate", agenerate)
    shown.prompt.value = "a cat"
    shown.run.click()
    until(lambda: told)
    shown.halt.click()
    assert shown.wait(20)
    shown.run.click()
    until(lambda: len(told) == 2)
    told[0](ImagesProgress(4, 4, jpeg()))
    assert "Step" not in shown.status.value
    assert (shown._progress.bar.value, shown._progress.preview.value) == (0, "")
    told[1](ImagesProgress(2, 4, jpeg()))
    assert "Step 2 of 4" in shown.status.value
    assert "<img" in shown._progress.preview.value
    assert session.gate is not None
    session.gate.set()
    assert shown.wait(20)
    assert "1 image" in shown.status.value


def test_stop_before_a_picture_is_done_keeps_nothing_and_frees_the_panel(make: Make) -> None:
    session, shown = make(gate=threading.Event())
    shown.prompt.value = "a cat"
    shown.run.click()
    until(lambda: session.asked)
    shown.run.click()  # a second click is nothing
    shown.halt.click()
    assert shown.wait(10)
    assert "given up" in shown.status.value
    assert len(session.asked) == 1
    assert not shown.pictures
    assert not shown.run.disabled
    shown.pin()
    assert "nothing to pin" in shown.status.value


@pytest.mark.parametrize("stopped", [True, False])
def test_pictures_that_were_done_come_into_the_gallery_though_the_request_ended(
    make: Make, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    _, shown = make()
    ask, waits = ImageStandIn.agenerate, threading.Event()

    async def ending(self: ImageStandIn, prompt: str, **options: Any) -> None:
        cause = Cancelled("") if stopped else DeadlineExceeded("The time is up.", hint=KEPT)
        cause.result = await ask(self, prompt, **options | {"num_images_per_prompt": 2})
        if not stopped:
            raise cause
        try:
            waits.set()
            await asyncio.sleep(20)
        except asyncio.CancelledError as end:
            raise end from cause

    monkeypatch.setattr(ImageStandIn, "agenerate", ending)
    shown.prompt.value, shown.controls.num_images_per_prompt.value = "a cat", 8
    shown.run.click()
    if stopped:
        assert waits.wait(10)
        shown.halt.click()
    assert shown.wait(10)
    said = "Stopped" if stopped else "DeadlineExceeded: The time is up."
    assert f"{said} · 2 of 8 pictures kept · 2 images" in shown.status.value
    assert ".result" not in shown.status.value
    assert len(shown.pictures) == 2
    assert shown.result is not None
    assert not shown.run.disabled


def test_a_panel_without_pictures_and_what_it_says(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    session, shown = make()
    shown.run.click()
    assert "Write a prompt first" in shown.status.value
    shown.controls.negative.value, shown.controls.guidance_scale.value = "rain", 1.0
    generated(shown)
    assert "negative_prompt: acts only with a guidance_scale above 1" in shown.status.value
    shown.controls.negative.value = ""
    shown.controls.size.value, shown.controls.width.value = "another", 513
    generated(shown)
    assert "513 pixels are no multiple of 8; 512 and 520 are" in shown.status.value
    shown.controls.size.value = "512 x 512"
    assert shown.controls.width.disabled
    assert not session.asked

    async def refuse(self: Any, prompt: str, **_: Any) -> None:
        raise QueueFull("1024 <requests> wait.", hint="Try again later.")

    monkeypatch.setattr(ImageStandIn, "agenerate", refuse)
    generated(shown)
    assert "QueueFull: 1024 &lt;requests&gt; wait. Try again later." in shown.status.value
    assert not shown.run.disabled
    for act in (shown.again, shown.vary, shown.take, shown.filing, shown.delete):
        act.click()
    assert "No picture yet." in shown.snapshot().text


def test_warnings_and_flags_are_told(make: Make) -> None:
    _, shown = make(warning="prompt: too long", flags=True)
    generated(shown)
    assert "prompt: too long" in shown.status.value
    assert "made black by the model&#x27;s safety checker" in shown.output.value


def saved(shown: ImagePanel) -> dict[str, bytes]:
    links = re.findall(r'download="(\d+\.\w+)"[^>]*base64,([^"]*)"', shown.files.value)
    return {name: b64decode(data) for name, data in links}


def test_a_download_has_its_parameters_inside_and_comes_back_by_the_upload(make: Make) -> None:
    _, shown = make()
    shown.controls.negative.value = "rain"
    generated(shown)
    shown.filing.click()
    seed = shown.pictures[0].seed
    files = saved(shown)
    assert set(files) == {f"{seed}.png", f"{seed}.webp"}
    with Image.open(io.BytesIO(files[f"{seed}.png"])) as image:
        assert json.loads(image.info["miinb"])["seed"] == seed
    for data in files.values():
        shown.prompt.value = shown.controls.negative.value = ""
        shown.controls.seed.value, shown.controls.lock.value = 0, False
        uploaded = {"name": "x.png", "type": "image/png", "size": len(data), "content": memoryview(data)}
        shown.upload.value = ({**uploaded, "last_modified": NOW},)
        assert (shown.prompt.value, shown.controls.negative.value) == ("a cat", "rain")
        assert (shown.controls.seed.value, shown.controls.lock.value) == (seed, True)
        assert shown.upload.value == ()
        assert "made by tiny" in shown.status.value
    shown.upload.value = ({**uploaded, "last_modified": NOW, "content": memoryview(b"GIF89a")},)
    assert "no PNG, WebP or JPEG" in shown.status.value
    with pytest.raises(InvalidRequest):
        shown.load_file(b"")


def test_a_file_with_an_unknown_scheduler_is_loaded(make: Make) -> None:
    _, shown = make()
    values: dict[str, Any] = dict.fromkeys(("negative_prompt", "model", "version"), "")
    values |= {"prompt": "p", "num_inference_steps": 9, "guidance_scale": 0, "seed": (1 << 63) - 1}
    values |= {"width": 40, "height": 64, "scheduler": "NewScheduler"}
    shown.load_file(encoded(np.asarray(Image.new("RGB", (40, 64))), values, "png"))
    controls = shown.controls
    assert (controls.scheduler.value, controls.size.value) == ("NewScheduler", "another")
    assert (controls.width.value, controls.height.value, controls.guidance_scale.value) == (40, 64, 0)
    assert not controls.lock.value  # a page's numbers do not hold this seed
    assert f"the seed {(1 << 63) - 1}, too large" in shown.status.value
    assert "locked" not in shown.status.value


def test_half_a_size_is_told(make: Make) -> None:
    _, shown = make()
    info, buffer = PngInfo(), io.BytesIO()
    info.add_itxt("miinb", json.dumps({"prompt": "p\ud800", "model": "\udfff", "width": 64, "seed": 3}))
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=info)
    shown.load_file(buffer.getvalue())
    assert shown.controls.size.value == "(the model's)"
    assert "only one side" in shown.status.value
    assert (shown.prompt.value, shown.controls.lock.value) == ("p\ufffd", True)
    assert "lone surrogates" in shown.status.value
    assert shown.status.value.encode()  # a page can be sent it


def test_pins_are_static_and_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    _, shown = make()
    generated(shown)
    shown.pin()
    assert "pinned below the panel" in shown.status.value
    html, text = shown._pins[0]
    assert html.count("<img ") == 1
    assert "data:image/webp;base64," in html
    assert f"Picture 1 · seed {shown.pictures[0].seed}" in text
    monkeypatch.setattr(work_panel, "_MOST_PINNED", len(html) + 10)
    shown.pin()
    assert "no room for another pin" in shown.status.value
    assert len(shown._pins) == 1


def test_a_snapshot_has_the_gallery_and_a_pin_the_chosen_picture(make: Make) -> None:
    _, shown = make()
    generated(shown)
    assert shown.snapshot()._repr_mimebundle_()["text/html"].count("<img ") == 1
    generated(shown, count=13)
    left = shown.snapshot()._repr_mimebundle_()
    assert left["text/html"].count("<img ") == 1 + 12  # the chosen one, and its page
    assert "14 pictures in the gallery (number · seed), 12 of them here: 1 · seed" in left["text/plain"]
    shown.pin()
    assert shown._pins[0][0].count("<img ") == 1


def test_voila_shows_no_later_output_so_nothing_is_pinned(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make()[1].pinning.layout.display is None
    monkeypatch.setenv("SERVER_SOFTWARE", "voila/0.5.8")
    _, shown = make()
    assert shown.pinning.layout.display == shown._two.pinning.layout.display == "none"


def test_deleting_goes_to_the_picture_beside(make: Make) -> None:
    _, shown = make()
    generated(shown, count=3)
    first, second, third = shown.pictures
    shown.gallery.choose(second)
    shown.delete.click()
    assert shown.chosen is third
    shown.delete.click()
    assert shown.chosen is first
    shown.delete.click()
    assert shown.chosen is None
    assert shown.output.value == ""
    assert shown._acts.layout.display == shown.gallery.box.layout.display == "none"
    generated(shown)
    assert shown.pictures[0].number == 4


def test_pages_of_twelve(make: Make) -> None:
    _, shown = make()
    generated(shown, count=30)
    assert shown.gallery._where.value == "Page 1 of 3 · 30 pictures"
    assert len(cells(shown)) == 12
    shown.gallery.next.click()
    shown.gallery.next.click()
    assert shown.gallery.next.disabled
    assert len(cells(shown)) == 6
    cells(shown)[5].click()
    assert shown.chosen is shown.pictures[29]
    shown.delete.click()
    assert shown.gallery._where.value == "Page 3 of 3 · 29 pictures"


def test_what_a_gallery_takes_is_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "MOST", 5)
    monkeypatch.setattr(gallery, "MOST_BYTES", 3000)
    _, shown = make(side=64)
    generated(shown, count=8)
    assert [picture.number for picture in shown.pictures] == [4, 5, 6, 7, 8]
    sizes = [len(picture.file or b"") for picture in shown.pictures]
    assert sizes[0] == 0
    assert sizes[-1] > 0
    assert sum(sizes) <= 3000
    assert "only its thumbnail was kept" in shown.output.value
    shown.filing.click()
    assert "Same again makes it once more" in shown.status.value
    shown.again.click()
    assert shown.wait(20)
    assert "Picture 4 once more" in shown.status.value


def test_two_pictures_are_compared(make: Make) -> None:
    session, shown = make()
    assert shown.comparing.layout.display == "none"
    generated(shown)
    session.brighter = 3
    shown.again.click()
    assert shown.wait(20)
    assert shown.comparing.layout.display is None
    two = shown._two
    assert two.viewer.picture.value == ""
    shown.comparing.switch.value = True
    assert (two.first.value, two.second.value) == (1, 2)
    assert "the largest difference is 3 of 255" in two.viewer.words.value
    assert two.viewer.picture.value.count("<img ") == 2
    two.pinning.click()
    assert shown._pins[0][0].count("<img ") == 3
    assert "the largest difference is 3 of 255" in shown._pins[0][1]
    two.second.value = 1
    assert "pixel for pixel" in two.viewer.words.value
    shown.controls.size.value = "512 x 768"
    generated(shown)
    assert "32 x 32 and 512 x 768" in two.viewer.words.value or "512 x 768 and 32 x 32" in two.viewer.words.value
    assert two.viewer.view.disabled


def test_hostile_text_is_no_markup(make: Make) -> None:
    _, shown = make(name="<b>evil", warning=PROBE)
    shown.controls.negative.value = PROBE
    generated(shown, PROBE)
    generated(shown, PROBE)
    shown.comparing.switch.value = True
    shown.filing.click()
    shown.pin()
    shown.pin_comparison()
    html = re.sub(
        r'<img( class="[\w-]+")? alt="[^"]*" style="[^"]*" src="data:image/webp;base64,[^"]*">', "", html_of(shown)
    )
    assert "<img" not in html
    assert "<script" not in html
    assert "<b>evil" not in html
    assert "\x1b" not in html_of(shown) + shown.snapshot().text
    assert "&lt;img src=x" in html
    assert not [widget for widget in walk(shown) if isinstance(widget, W.HTMLMath)]


def test_every_control_is_named(make: Make) -> None:
    _, shown = make()
    generated(shown)
    check_controls(shown, 30)
    for widget in walk(shown):
        if isinstance(widget, (W.FileUpload, W.IntSlider, W.IntProgress)):
            assert widget.description
            assert widget.tooltip
    assert all(
        isinstance(widget, (W.Box, W.HTML, W.Label, W.FileUpload, W.IntSlider, W.IntProgress, *KINDS))
        for widget in walk(shown)
    )


def test_updates_are_small_but_for_the_pictures(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    _, shown = make(step_s=0.005, preview=jpeg())
    shown.controls.num_inference_steps.value, shown.controls.preview_steps.value = 200, 1
    sent: list[int] = []

    def send(self: Any, msg: Any, buffers: Any = None) -> None:
        sent.append(len(re.sub(r"base64,[\w+/=]*", "", json.dumps(msg, default=str))))

    monkeypatch.setattr(W.Widget, "_send", send)
    generated(shown, count=12)
    assert len(shown.pictures) == 12
    assert sum(sent) < 60_000


def test_another_deployment_can_be_chosen(make: Make) -> None:
    other = ImageStandIn(name="other")
    _, shown = make(other, StandIn(name="stories"))
    assert shown.deployment.options == ("other", "tiny")
    shown.deployment.value = "other"
    generated(shown)
    assert len(other.asked) == 1
    assert shown.pictures[0].deployment == "other"


def test_a_panel_that_does_not_fit_the_task_is_refused() -> None:
    with pytest.raises(InvalidValue, match="'text'"):
        panel(StandIn(), "image")
    with pytest.raises(InvalidValue, match="'image'"):
        panel(ImageStandIn(), "text")


def test_close_ends_what_runs_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    session = ImageStandIn(gate=threading.Event())
    monkeypatch.setitem(vars(miinb), "deployments", lambda: [session.status()])
    with nothing_left():
        shown = panel(session, "image")
        shown.prompt.value = "a"
        assert session.gate is not None
        session.gate.set()
        shown.controls.num_inference_steps.value = 1
        for _ in range(2):
            shown.run.click()
            assert shown.wait(10)
        shown.comparing.switch.value = True
        shown._two.viewer.view.value = "slider"
        for place in range(40):
            shown._two.viewer.position.value = place
        session.gate.clear()
        shown.run.click()
        until(lambda: len(session.asked) == 3)
        shown.close()
        until(lambda: not [one for one in threading.enumerate() if one.name.startswith("miinb-panel")])
