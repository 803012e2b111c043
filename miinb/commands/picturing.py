"""What `gen` does with a deployment of text-to-image: pictures in the cell, and in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miinb.commands.options import GENERATION, IMAGES, TIMEOUT, given
from miinb.errors import Interrupted, InvalidRequest, MiinbError
from miinb.image_results import KEPT, writable
from miinb.tasks import find_task

if TYPE_CHECKING:
    from miinb.commands.context import Context
    from miinb.results import Result
    from miinb.session import Session

#: Options of texts that would do nothing.
_OF_TEXTS = ("chat", "system", "stream")


def makes_images(session: Session) -> bool:
    """Whether a deployment makes pictures of prompts."""
    return find_task(session.task).image


def pictures(context: Context, values: Mapping[str, Any], session: Session, prompts: Sequence[str]) -> Result:
    """Pictures of each prompt, shown and written where `--out` says; a terminal, which shows none, always writes.

    Raises:
        InvalidRequest: an option is one of texts, or nothing can be written to the folder.
        RequestError: a request failed.
        Interrupted: the Stop button was pressed. Pictures that were complete are shown and written all the same.
    """
    options = given(values, (*GENERATION, *IMAGES, TIMEOUT))
    for name in _OF_TEXTS:
        if values.get(name):
            flag = "--" + name
            raise InvalidRequest(f"{flag}: {session.name} makes pictures.", hint=f"Leave {flag} out.")
    for name in ("image", "mask_image"):
        if name in options:
            options[name] = _one_or_all(options[name])
    if size := options.pop("size", None):
        if "width" in options or "height" in options:
            raise InvalidRequest("--size: it is width and height together.", hint="Leave --width and --height out.")
        options |= {"width": size[0], "height": size[1]}
    folder = options.pop("out", None) or (None if context.in_notebook else ".")
    if folder:
        writable(folder)  # before minutes of work
    shown = not (values.get("quiet") or values["format"] == "json")
    try:
        result: Any = session.generate(list(prompts) if len(prompts) > 1 else prompts[0], **options)
    except (Interrupted, MiinbError) as stopped:
        if stopped.result is not None:
            _show(context, stopped.result, folder, shown=shown)
            if folder:
                stopped.hint = stopped.hint.replace(KEPT, f"What is done was written to {Path(folder).resolve()}.")
        raise
    _show(context, result, folder, shown=shown)
    pictured: Result = result
    return pictured


def _show(context: Context, result: Any, folder: str | None, *, shown: bool) -> None:
    if shown:
        context.screen.show(result)
    for file in result.save(folder) if folder else ():
        if shown:
            context.screen.show(str(file))


def _one_or_all(pictures: Sequence[Any]) -> Any:
    """The only one, or all in order; a variable may hold a list of them."""
    flat = [one for part in pictures for one in (part if isinstance(part, (list, tuple)) else [part])]
    return flat[0] if len(flat) == 1 else flat
