"""The deployments of this user on this machine: where their files lie, which live, and how to ask their supervisors.

The truth is the `flock` that a supervisor holds while it lives: whoever can take it may sweep what is left. An entry
counts as alive only if its process exists (no zombie), started when the entry says, since this boot; a supervisor that
answers on `control.sock` proves itself by its instance id.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import psutil

from miinb import __version__
from miinb.errors import DeploymentExists, DeploymentNotFound, MiinbError, Unavailable, VersionMismatch, did_you_mean
from miinb.messages import Status, from_dict

#: Longest path of a unix socket that Linux takes, less its closing zero.
MAX_SOCKET_PATH = 107
_LONGEST_SOCKET = "/control.sock"
_HASHED_NAME = 17
#: In the environment of every process of a deployment, so that orphans are told apart from strangers.
INSTANCE_VARIABLE = "MIINB_INSTANCE"
_SHM = Path("/dev/shm")
#: States that a supervisor writes when it begins to end; it answers no more questions soon after.
ENDING = ("draining", "failed")


@dataclass(frozen=True, slots=True)
class Entry:
    """`deployment.json`: what is needed to find, check and describe a deployment. No secrets."""

    name: str
    instance_id: str
    pid: int  # of the supervisor
    start_ticks: int  # when that process started, in clock ticks since boot: told apart from a later one of that pid
    boot_id: str
    version: str
    config: Mapping[str, Any]
    folder: str = ""
    address: str = ""
    tcp_address: str = ""  # where it listens on loopback, too
    state: str = "starting"  # then ready, and draining or failed at the end
    persist: bool = False
    started_at: float = 0.0  # seconds since the epoch
    ports: tuple[int, ...] = ()  # names of shared-memory segments hold them

    def save(self, folder: Path) -> None:
        """Write `deployment.json` so that a reader sees the old or the new text, never a part."""
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".deployment-")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(dataclasses.asdict(self), stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, folder / "deployment.json")

    @property
    def alive(self) -> bool:
        """Whether the supervisor's process is the one that wrote the entry, and runs."""
        return self.boot_id == boot_id() and start_ticks(self.pid) == self.start_ticks


def load_entry(folder: Path) -> Entry | None:
    """The entry of a deployment's folder; None if there is none or it is damaged."""
    try:
        values = json.loads((folder / "deployment.json").read_text(encoding="utf-8"))
        entry = from_dict(Entry, {**values, "folder": str(folder), "ports": tuple(values["ports"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return entry


def boot_id() -> str:
    """This boot of the machine, as the kernel names it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (untouched by clock changes); None if gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def parent(pid: int) -> int | None:
    """The process that started this one; None if either is gone (the orphan's new parent did not start it)."""
    try:
        above = psutil.Process(pid).parent()
    except psutil.Error:
        return None
    return above.pid if above is not None and above.pid > 1 else None


# Places


def state_folder() -> Path:
    """The folder that holds one folder a deployment: of this user, mode 0700.

    `$XDG_RUNTIME_DIR/miinb` if that can be written, else `platformdirs.user_state_dir("miinb")`. Where its path leaves
    no room for a socket's (107 bytes), a link in it leads to a short folder among the temporary files.

    Raises:
        MiinbError: the folder belongs to someone else or cannot be made.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    usable = runtime and Path(runtime).is_absolute() and os.access(runtime, os.W_OK | os.X_OK)
    folder = Path(runtime, "miinb") if usable else Path(platformdirs.user_state_dir("miinb"))
    _private(folder)
    if len(os.fsencode(folder)) + 1 + _HASHED_NAME + len(_LONGEST_SOCKET) <= MAX_SOCKET_PATH:
        return folder
    return _short_folder(folder / ".short")


def _private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.lstat()
        if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and facts.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise MiinbError(
            f"The state folder {folder} cannot be used: {error.strerror}.", hint="Set XDG_RUNTIME_DIR to another place."
        ) from None
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
        raise MiinbError(f"{folder} belongs to another user.", hint="Set XDG_RUNTIME_DIR to a folder of your own.")


def _short_folder(link: Path) -> Path:
    for _ in range(3):
        with contextlib.suppress(OSError):
            target = Path(os.readlink(link))
            if target.is_dir():  # the system may have cleaned its temporary files
                _private(target)
                return target
            link.unlink()
        fresh = tempfile.mkdtemp(prefix="miinb-")
        try:
            os.symlink(fresh, link)
        except FileExistsError:  # another process was first
            os.rmdir(fresh)
    raise MiinbError(f"{link} cannot be made.", hint="Set XDG_RUNTIME_DIR to a short path.")


def folder_of(name: str) -> Path:
    """The folder of a deployment's name; a name too long for a socket's path is hashed."""
    state = state_folder()
    plain = state / name.replace("/", "%2F")
    if len(os.fsencode(plain)) + len(_LONGEST_SOCKET) <= MAX_SOCKET_PATH:
        return plain
    return state / ("%" + hashlib.sha256(name.encode()).hexdigest()[: _HASHED_NAME - 1])


def default_name(model: str) -> str:
    """A deployment name from a model's path or hub name."""
    last = Path(model.rstrip("/")).name or "model"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last.removesuffix(".gguf"))[:56].strip("-.") or "model"


def unique_name(wanted: str) -> str:
    """The wanted name, with a number behind it if a live deployment has it."""
    taken = {entry.name for entry in entries()}
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}-{number}"
    return name


# Who holds a name


def claim(folder: Path, patience_s: float = 1.0) -> int:
    """Take a deployment's name: the locked file's descriptor; the lock lasts as long as the process.

    Left-overs of a dead deployment of that name are removed.

    Raises:
        DeploymentExists: a live deployment has the name.
    """
    deadline = time.monotonic() + patience_s  # a sweep of another process holds the lock for moments
    while True:
        lock = _lock(folder, create=True)
        if lock is not None:
            _sweep(folder)
            return lock
        entry = load_entry(folder)
        if (entry is not None and entry.alive) or time.monotonic() > deadline:
            name = entry.name if entry else folder.name.replace("%2F", "/")
            raise DeploymentExists(
                f"There is a deployment {name!r} already.",
                hint=f"Use miinb.attach({name!r}), stop it, or take another name.",
            )
        time.sleep(0.02)


def release(folder: Path, lock: int) -> None:
    """Remove a deployment's files, the lock's last, and let go of its name."""
    _sweep(folder)
    with contextlib.suppress(OSError):
        (folder / "lock").unlink()
        folder.rmdir()
    os.close(lock)


def _lock(folder: Path, *, create: bool) -> int | None:
    try:
        if create:
            folder.mkdir(mode=0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
        lock = os.open(folder / "lock", flags, 0o600)
    except FileNotFoundError:  # removed by its owner between two steps
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(folder / "lock").st_ino == os.fstat(lock).st_ino:
            return lock
    except OSError:
        pass
    os.close(lock)
    return None


def _sweep(folder: Path) -> None:
    """Remove everything of a folder but its lock, and what a dead deployment left elsewhere."""
    entry = load_entry(folder)
    if entry is not None:
        if entry.boot_id == boot_id():
            end_orphans(entry.instance_id)
        remove_segments(entry.ports)
    for path in list(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != "lock":
            path.unlink(missing_ok=True)


def end_orphans(instance_id: str) -> None:
    """SIGKILL the processes of a deployment whose supervisor is dead; others are never touched."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(INSTANCE_VARIABLE) == instance_id:
                process.send_signal(signal.SIGKILL)


def remove_segments(ports: tuple[int, ...]) -> None:
    """Unlink the shared memory that DeepSpeed's CPU all-reduce leaves behind for these rendezvous ports."""
    for port in ports:
        for segment in _SHM.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_*"):
            segment.unlink(missing_ok=True)


def entries() -> list[Entry]:
    """The live deployments, by name. What dead ones left is swept."""
    return sorted(_scan(), key=lambda entry: entry.name)


def _scan() -> Iterator[Entry]:
    for folder in state_folder().iterdir():
        if folder.is_symlink() or not folder.is_dir():
            continue
        lock = _lock(folder, create=False)
        if lock is not None:
            release(folder, lock)
            continue
        if not (folder / "lock").exists():
            with contextlib.suppress(OSError):
                folder.rmdir()  # succeeds only when it is empty: a start that ended before its lock
            continue
        entry = load_entry(folder)
        if entry is not None and entry.alive:
            yield entry


def find(name: str) -> Entry:
    """The live deployment of that name.

    Raises:
        DeploymentNotFound: there is none; the near name is in the hint.
        VersionMismatch: it was started by another version of miinb.
    """
    known = {entry.name: entry for entry in entries()}
    entry = known.get(name)
    if entry is None:
        hint = did_you_mean(name, known) if known else "None is running: start one with miinb.Session(model)."
        raise DeploymentNotFound(f"There is no deployment {name!r}.", hint=hint)
    if entry.version != __version__:
        raise VersionMismatch(
            f"Deployment {name!r} runs miinb {entry.version}, this is {__version__}.",
            hint=f"Stop it (`kill {entry.pid}` ends all of it) and start it again.",
        )
    return entry


def ask(entry: Entry, command: str, *, timeout_s: float = 5.0, **fields: Any) -> dict[str, Any]:
    """One question to a deployment's supervisor: status, stop (drain_s), keep.

    The question names the instance: a later deployment of that name must not be ended in its place.

    Raises:
        Unavailable: it does not answer, or another deployment answers in its place.
    """
    gone = f"Deployment {entry.name!r} does not answer"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(os.path.join(entry.folder, "control.sock"))
            question = {"command": command, "instance_id": entry.instance_id, **fields}
            connection.sendall(json.dumps(question).encode() + b"\n")
            with connection.makefile("rb") as stream:
                answer: dict[str, Any] = json.loads(stream.readline())
    except (OSError, ValueError) as error:
        raise Unavailable(f"{gone} ({error}).", hint="It has ended; start it again.") from None
    if "error" in answer:
        raise Unavailable(f"{gone}: {answer['error']}.", hint=f"Use miinb.attach({entry.name!r}).")
    return answer


def last_state(entry: Entry) -> str | None:
    """The state of a deployment whose supervisor does not answer: what it wrote when it began to end, else "lost".

    None: its files are gone, as it has ended.
    """
    now = load_entry(Path(entry.folder))
    if now is None or now.instance_id != entry.instance_id:
        return None
    return now.state if now.state in ENDING else "lost"


def without_answer(entry: Entry, state: str) -> Status:
    """What the entry alone tells of a deployment in this state."""
    names = ("model", "task", "engine", "dtype", "device")
    model, task, engine, dtype, device = (str(entry.config.get(name) or "") for name in names)
    return Status(
        name=entry.name,
        state=state,
        model=model,
        task=task,
        engine=engine,
        dtype=dtype,
        device=device,
        address=entry.address,
        tcp_address=entry.tcp_address,
        pid=entry.pid,
        persist=entry.persist,
        uptime_s=max(0.0, time.time() - entry.started_at) if entry.started_at else 0.0,
    )
