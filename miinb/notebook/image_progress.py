"""How far pictures are: a bar of the steps and a small preview, at most five times a second."""

from __future__ import annotations

import threading
from collections.abc import Callable

import ipywidgets as W

from miinb.image_messages import ImagesProgress
from miinb.notebook.controls import named
from miinb.notebook.inline import img
from miinb.notebook.streaming import Throttle

#: Updates a second, and parts into which the steps are divided: what all updates of a request take is bounded.
_HZ, _PARTS = 5.0, 60
#: How wide a preview is shown, pixels.
_WIDTH = 192


class ImageProgress:
    """A bar and a preview, which are there while a request runs.

    Attributes:
        box: the widget.
    """

    def __init__(self) -> None:
        self.bar = named(W.IntProgress(description="Steps", tooltip="Steps of the denoising"), "progress")
        self.preview = named(W.HTML(), "preview")
        self.box = W.VBox([self.bar, self.preview], layout={"display": "none"})
        self._changes = 0  # begins and ends so far

    def begin(self, total: int) -> None:
        """A request of so many steps begins. The lock is held."""
        self._changes += 1
        self.bar.max, self.bar.value = total, 0
        self.box.layout.display = None

    def end(self) -> None:
        """There is nothing to wait for any more. The lock is held."""
        self._changes += 1
        self.preview.value = ""
        self.box.layout.display = "none"

    def taking(self, lock: threading.RLock, tell: Callable[[int, int], None]) -> Callable[[ImagesProgress], None]:
        """A function that shows the progress of the request that has begun as it comes; it takes the lock.

        What still comes of a request that was given up is not shown.

        Args:
            lock: of the panel.
            tell: called with steps and all steps, with the lock held.
        """
        throttle, last, latest, own = Throttle(_HZ), 0, b"", self._changes

        def told(progress: ImagesProgress) -> None:
            nonlocal last, latest
            latest = progress.preview or latest
            far = (progress.step - last) * _PARTS >= progress.total or progress.step == progress.total
            if not far or not throttle.due(""):
                return
            last = progress.step
            with lock:
                if self._changes != own:
                    return
                self.bar.max, self.bar.value = progress.total, progress.step
                if latest:
                    words = f"Preview at step {progress.step} of {progress.total}"
                    self.preview.value, latest = img(latest, "jpeg", words, _WIDTH), b""
                tell(progress.step, progress.total)

        return told
