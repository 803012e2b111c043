"""The image panel: a prompt in, pictures out; a gallery of them, and whatever is done with one of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import ipywidgets as W

from miinb.config import MAX_SEED
from miinb.errors import Cancelled, InvalidRequest, MiinbError
from miinb.image_difference import difference
from miinb.image_metadata import converted, read_parameters
from miinb.image_params import MAX_IMAGES
from miinb.notebook import cards
from miinb.notebook.controls import PICTURING, Fold, button, named, prompt_area, save_link
from miinb.notebook.gallery import Gallery, GalleryPicture, pictures_of
from miinb.notebook.gallery_pair import GalleryPair
from miinb.notebook.image_cards import images_line
from miinb.notebook.image_controls import ImageControls
from miinb.notebook.image_progress import ImageProgress
from miinb.notebook.work_panel import ROW, WorkPanel
from miinb.wording import size_words

if TYPE_CHECKING:
    from miinb.image_results import ImageResult
    from miinb.session import Session

#: A day: what takes long is ended by Stop, not by a limit.
TIMEOUT_S = 86_400.0
#: A file that is larger is not put into a link.
_MOST_LINK_BYTES = 8_000_000
_VARIATIONS = 4


class ImagePanel(WorkPanel):
    """Prompt, parameters, progress with a preview, and a gallery.

    The picture that is chosen in the gallery stands below it, with what made it: it can be made again, varied by other
    seeds, saved, pinned, deleted, and compared with another one. `panel.chosen` has it (`.image` of PIL's, `.file`,
    `.parameters`), `panel.pictures` has all, `panel.result` the last answer as `ImageResult`.

    Args:
        session: the deployment that it asks first; others of text-to-image can be chosen.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.result: ImageResult | None = None
        self._of: GalleryPicture | None = None  # that the running request makes again
        self._make_controls(session)
        self._make_gallery()
        self.children = [
            W.Box([self.deployment], layout=ROW),
            self.prompt,
            self.controls.negative,
            W.Box([self.run, self.halt], layout=ROW),
            self.controls.box,
            self.status,
            self._progress.box,
            self.gallery.box,
            self._acts,
            self.files,
            self.output,
            self.comparing,
        ]
        self._set_busy(False)

    def _make_controls(self, session: Session) -> None:
        self._choose(session, "The deployment that makes the pictures", tasks=PICTURING, own_task=session.task)
        self.prompt = prompt_area("What the picture shows", example="a lighthouse at dusk, oil painting", rows=3)
        self.controls = ImageControls()
        self.run = button("Generate", "generate", "Make pictures", self.generate, button_style="primary", icon="play")
        self.halt = self._halt("End the request; pictures that are done are kept")
        self.upload = named(
            W.FileUpload(
                description="Load from a picture",
                tooltip="Prompt and parameters of a PNG, WebP or JPEG that miinb or the A1111 web UI made",
                accept=".png,.webp,.jpg,.jpeg",
                layout={"width": "auto", "align_self": "flex-start"},
            ),
            "upload",
        )
        self.upload.observe(self._uploaded, "value")
        self.controls.add(self.upload)
        self._progress = ImageProgress()

    def _make_gallery(self) -> None:
        self.gallery = Gallery(self._lock, self._show_chosen)
        self.again = button("Same again", "again", "This picture once more, by its seed and parameters", self.remake)
        self.vary = button("Variations", "vary", "The same parameters with other seeds", self.variations)
        self.count = named(
            W.BoundedIntText(
                description="of",
                tooltip="How many variations",
                value=_VARIATIONS,
                min=1,
                max=MAX_IMAGES,
                layout={"width": "6em"},
                style={"description_width": "1.2em"},
            ),
            "variations",
        )
        self.take = button("Use parameters", "use", "Set prompt and parameters to those of this picture", self.use)
        self.filing = button("Download …", "make-files", "Make links that save this picture", self.make_files)
        self.delete = button("Delete", "delete", "Take this picture out of the gallery", self.forget, icon="trash")
        acts = [self.again, self.vary, self.count, self.take, self.pinning, self.filing, self.delete]
        self._acts = W.Box(acts, layout={**ROW, "display": "none"})
        self.pinning.tooltip = "Keep this picture in the notebook, below the panel"
        self._two = GalleryPair(self._lock, self.gallery, self.pin_comparison)
        self.comparing = Fold("Compare two pictures", self._two.box, "comparing")
        self.comparing.layout.display = "none"
        self.comparing.switch.observe(self._unfolded, "value")

    @property
    def pictures(self) -> list[GalleryPicture]:
        """The gallery's, oldest first."""
        return list(self.gallery.pictures)

    @property
    def chosen(self) -> GalleryPicture | None:
        """The picture that is shown large; None while there is none."""
        return self.gallery.chosen

    # What the buttons do; each may be called from any thread, and from code

    def generate(self, _: Any = None) -> None:
        """Make pictures with prompt and parameters as they stand. Returns at once; a running request goes on."""
        with self._lock:
            text = self.prompt.value
            if not self._can_ask(text):
                return
            try:
                parameters = self.controls.values()
            except InvalidRequest as error:
                self._say(error.line())
                return
            self._ask(text, parameters)

    def remake(self, _: Any = None) -> None:
        """The chosen picture once more, by its seed and parameters; the line below says whether it is the same."""
        with self._lock:
            if self.chosen is not None and not self._busy:
                self._ask(self.chosen.prompt, self.chosen.parameters, of=self.chosen)

    def variations(self, _: Any = None) -> None:
        """Pictures like the chosen one, with the seeds that follow its own and that the gallery has not."""
        with self._lock:
            if self.chosen is not None and not self._busy:
                more = {"seed": self._following(self.chosen), "num_images_per_prompt": self.count.value}
                self._ask(self.chosen.prompt, self.chosen.parameters | more)

    def _following(self, picture: GalleryPicture) -> int:
        """The first seed behind a picture's of which there is no such picture."""
        own = picture.prompt, picture.parameters | {"seed": None}
        like = (other for other in self.pictures if (other.prompt, other.parameters | {"seed": None}) == own)
        there, seed = {other.seed for other in like}, picture.seed
        while seed in there:
            seed = (seed + 1) % (MAX_SEED + 1)
        return seed

    def use(self, _: Any = None) -> None:
        """Set prompt and controls to those of the chosen picture, its seed locked."""
        with self._lock:
            if self.chosen is not None:
                self._load(self.chosen.prompt, self.chosen.parameters)
                self._say(f"Prompt and parameters are those of picture {self.chosen.number}; its seed is locked.")

    def forget(self, _: Any = None) -> None:
        """Take the chosen picture out of the gallery."""
        with self._lock:
            if self.chosen is not None and not self._busy:
                number = self.chosen.number
                self.gallery.remove(self.chosen)
                self._say(f"Picture {number} is deleted.")

    def pin_comparison(self, _: Any = None) -> None:
        """Write the two pictures that are compared, and their numbers, as static output below the panel."""
        with self._lock:
            self._pin(self._two.compared, "The comparison")

    def make_files(self, _: Any = None) -> None:
        """Make the links that save the chosen picture, as PNG and as WebP, with its parameters inside."""
        with self._lock:
            picture = self.chosen
            if picture is None:
                return
            if picture.file is None:
                self._say("Only its thumbnail was kept: Same again makes it once more.")
                return
            links = []
            for kind in ("png", "webp"):
                data = converted(picture.file, kind)
                label = f"Save .{kind} ({size_words(len(data))})"
                if len(data) > _MOST_LINK_BYTES:
                    links.append(f".{kind} is too large for a link: panel.result.save(folder), or panel.chosen.file")
                else:
                    links.append(save_link(data, f"{picture.seed}.{kind}", label))
            self.files.value = " &nbsp; ".join(links)

    def load_file(self, data: bytes) -> None:
        """Set prompt and parameters to those that a PNG, WebP or JPEG file names, as far as it does.

        Raises:
            InvalidRequest: it is no such file, or names none.
        """
        made = read_parameters(data)
        with self._lock:
            self._load(made.prompt, made.parameters)
            model = [f"made by {made.model}"] if made.model else []
            seed = ["its seed is locked"] if self.controls.lock.value else []
            notes = [*made.notes, *self.controls.misfits(made.parameters)]
            self._say(" · ".join(["Prompt and parameters are the file's", *model, *seed, *notes]))

    def _uploaded(self, change: Any) -> None:
        if not change["new"]:
            return
        content = bytes(change["new"][0]["content"])
        with self._lock:
            self.upload.value = ()
            try:
                self.load_file(content)
            except MiinbError as error:
                self._say(error.line())

    def _load(self, prompt: str, parameters: Mapping[str, Any]) -> None:
        self.prompt.value = prompt
        self.controls.load(parameters)
        self.controls.lock.value = self.controls.seed.value == parameters.get("seed")

    def _ask(self, prompt: str, parameters: dict[str, Any], of: GalleryPicture | None = None) -> None:
        deployment, previews = self.deployment.value, self.controls.previews
        self._of = of
        self.files.value = ""
        self._progress.begin(parameters["num_inference_steps"])
        self._begin(lambda: self._make(prompt, parameters, deployment, previews), "Waiting for the first step …")

    # The worker

    def _make(self, prompt: str, parameters: dict[str, Any], deployment: str, previews: Mapping[str, Any]) -> str:
        session, began = self._session(deployment), time.monotonic()
        told = self._progress.taking(self._lock, self._told(began))
        count = parameters.get("num_images_per_prompt", 1)
        options: dict[str, Any] = {**parameters, **previews, "on_progress": told, "timeout_s": TIMEOUT_S}
        ended: list[str] = []
        try:
            result: Any = self._awaited(lambda: session.agenerate(prompt, **options))
        except MiinbError as error:
            if error.result is None:
                raise
            result, ended = error.result, [_ended(error), f"{len(error.result.images)} of {count} pictures kept"]
        pictures = pictures_of(result, parameters, deployment, self.gallery.next_number)
        said = [*ended, images_line(result), *result.warnings]
        if self._of is not None:
            said.insert(0, _sameness(pictures[0], self._of))
        with self._lock:
            self.result = result
            self.gallery.add(pictures)
        return " · ".join(said)

    def _told(self, began: float) -> Callable[[int, int], None]:
        def told(step: int, total: int) -> None:
            took = time.monotonic() - began
            left = f" · about {cards.duration(took / step * (total - step))} left" if 0 < step < total else ""
            if not self._stop.is_set():
                self._say(f"Step {step} of {total} · {cards.duration(took)}{left}")

        return told

    # What is shown; the lock is held

    def _set_busy(self, busy: bool) -> None:
        none = self.chosen is None
        self.run.disabled = self.deployment.disabled = busy
        self.halt.disabled = not busy
        for act in (self.again, self.vary, self.delete):
            act.disabled = busy or none
        self.pinning.disabled = none
        if not busy:
            self._progress.end()

    def _show_chosen(self, picture: GalleryPicture | None) -> None:
        self.files.value = ""
        self.output.value = picture.large_html() if picture is not None else ""
        self._acts.layout.display = None if picture is not None else "none"
        self.comparing.layout.display = None if len(self.gallery.pictures) > 1 else "none"
        self._set_busy(self._busy)
        if self.comparing.unfolded:
            self._two.refresh()

    def _unfolded(self, _: Any) -> None:
        with self._lock:
            if self.comparing.unfolded:
                self._two.refresh()

    def _card(self) -> cards.Card | None:
        return self.chosen.card() if self.chosen is not None else None

    def _left_card(self) -> cards.Card | None:
        chosen, page = self._card(), self.gallery.page_card()
        return (chosen[0] + page[0], f"{chosen[1]}\n{page[1]}") if chosen and page else chosen

    def _empty_card(self) -> cards.Card:
        return cards.card("Image panel", facts=[("deployment", self.deployment.value)], foot="No picture yet.")

    def _summary(self) -> str:
        return f"Picture {self.chosen.name}" if self.chosen is not None else ""

    def _closing(self) -> None:
        self.upload.unobserve_all()
        self.controls.close()
        self._two.close()
        self.comparing.switch.unobserve_all()

    def __repr__(self) -> str:
        return f"ImagePanel({self.deployment.value!r}, pictures={len(self.gallery.pictures)})"


def _ended(error: MiinbError) -> str:
    """Why a request ended before all of its pictures were there."""
    return "Stopped" if isinstance(error, Cancelled) else f"{type(error).__name__}: {error.message}"


def _sameness(made: GalleryPicture, of: GalleryPicture) -> str:
    """Whether a picture that was made again is what it was."""
    if of.file is None or made.image.size != of.image.size:
        return f"Picture {of.number} once more"
    apart = difference(made.image, of.image)
    if apart.equal:
        return f"The same as picture {of.number}, pixel for pixel"
    return f"Not quite picture {of.number}: {apart}"
