"""The registry against real files, locks and processes: who lives, who is swept, who wins a name."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from miinb import __version__, registry
from miinb.errors import DeploymentExists, DeploymentNotFound, MiinbError, VersionMismatch


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "miinb"


def entry_of(name: str) -> registry.Entry:
    """An entry that this test's own process could have written."""
    ticks = registry.start_ticks(os.getpid())
    assert ticks is not None
    return registry.Entry(name, "id", os.getpid(), ticks, registry.boot_id(), __version__, {}, state="ready")


def live(name: str, **changes: object) -> int:
    folder = registry.folder_of(name)
    lock = registry.claim(folder)
    dataclasses.replace(entry_of(name), **changes).save(folder)  # type: ignore[arg-type]
    return lock


def test_the_state_folder_is_private(state: Path) -> None:
    state.mkdir(mode=0o755)
    assert registry.state_folder() == state
    assert state.stat().st_mode & 0o777 == 0o700


def test_a_state_folder_that_is_no_folder_is_refused(state: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    state.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MiinbError, match="belongs to another user"):
        registry.state_folder()


def test_an_unusable_runtime_folder_falls_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/no/such/folder")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert registry.state_folder() == tmp_path / "state" / "miinb"


@pytest.mark.parametrize("deep", [0, 120])
@pytest.mark.parametrize("name", ["m", "org/model", "x" * 64, "/".join("abcdefgh") * 4])
def test_sockets_fit_whatever_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, deep: int, name: str) -> None:
    runtime = tmp_path / ("d" * deep)
    runtime.mkdir(exist_ok=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    folder = registry.folder_of(name)
    assert len(str(folder / "control.sock")) <= registry.MAX_SOCKET_PATH
    assert folder == registry.folder_of(name)  # the next process finds it too
    os.close(registry.claim(folder))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    registry.entries()
    if deep:
        folder.parent.rmdir()


def test_names() -> None:
    assert registry.default_name("/models/SmolLM2-135M/") == "SmolLM2-135M"
    assert registry.default_name("org/some model.gguf") == "some-model"
    lock = live("m")
    assert registry.unique_name("m") == "m-2"
    assert registry.unique_name("other") == "other"
    os.close(lock)


def test_find_names_the_near_one() -> None:
    with pytest.raises(DeploymentNotFound, match="None is running"):
        registry.find("gpt")
    lock = live("gpt2")
    with pytest.raises(DeploymentNotFound, match="Did you mean 'gpt2'"):
        registry.find("gpt")
    assert registry.find("gpt2").state == "ready"
    os.close(lock)


def test_another_version_is_refused() -> None:
    lock = live("m", version="0.0.1")
    with pytest.raises(VersionMismatch, match=r"runs miinb 0\.0\.1"):
        registry.find("m")
    os.close(lock)


@pytest.mark.parametrize(
    "stale",
    [
        {"pid": 2**22 + 1},  # gone
        {"start_ticks": 1},  # the pid belongs to another process now
        {"boot_id": "another boot"},
    ],
)
def test_stale_entries_are_not_alive(stale: dict[str, object]) -> None:
    lock = live("m", **stale)  # the lock is held: not swept, but not listed either
    assert registry.entries() == []
    assert registry.folder_of("m").exists()
    os.close(lock)
    assert registry.entries() == []
    assert not registry.folder_of("m").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "m"}', "\0"])
def test_damaged_entries_are_swept(text: str) -> None:
    folder = registry.folder_of("m")
    os.close(registry.claim(folder))
    (folder / "deployment.json").write_text(text)
    (folder / "logs").mkdir()
    (folder / "logs" / "x.log").touch()
    assert registry.entries() == []
    assert not folder.exists()


def test_a_zombie_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert registry.start_ticks(child.pid) is None


def test_sweeping_ends_orphans_of_that_instance_and_nobody_else() -> None:
    def sleeper(instance: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"],
            env={registry.INSTANCE_VARIABLE: instance},
            stdout=subprocess.PIPE,
        )

    with sleeper("dead-one") as orphan, sleeper("other") as stranger:
        for process in (orphan, stranger):
            assert process.stdout is not None
            process.stdout.readline()
        os.close(live("m", instance_id="dead-one", pid=2**22 + 1))
        assert registry.entries() == []
        assert orphan.wait(5) != 0
        assert stranger.poll() is None
        stranger.kill()


def test_one_winner_of_a_race() -> None:
    folder = registry.folder_of("m")

    def race(_: int) -> int | None:
        try:
            return registry.claim(folder, patience_s=0.0)
        except DeploymentExists:
            return None

    with ThreadPoolExecutor(8) as pool:
        for _ in range(50):
            winners = [lock for lock in pool.map(race, range(8)) if lock is not None]
            assert len(winners) == 1
            registry.release(folder, winners[0])
    assert not folder.exists()


def test_claiming_while_others_scan_always_succeeds() -> None:
    def scan(_: int) -> None:
        for _ in range(100):
            registry.entries()

    folder = registry.folder_of("m")
    with ThreadPoolExecutor(2) as pool:
        scans = [pool.submit(scan, n) for n in range(2)]
        for _ in range(100):
            registry.release(folder, registry.claim(folder))
        for done in scans:
            done.result()
