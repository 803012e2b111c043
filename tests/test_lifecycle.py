"""What happens to a deployment when real Jupyter kernels are interrupted, end, or are killed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel

import miinb

START = """
import json, miinb
from miinb.demo import tiny_model
def start(**more):
    return miinb.Session(tiny_model(), device="cpu", dtype="fp32", options={"threads": 1}, **more)
"""
#: Answers that take the tiny model long enough; the cell waits in the stream, or in its own code between two chunks.
OPEN = "c = s.stream('Once upon a time,', max_new_tokens=450, ignore_eos=True); next(c); "
IN_STREAM = OPEN + "print('got', flush=True); c.result"
IN_CELL = OPEN + "print('got', flush=True)\nimport time\ntime.sleep(60)"
LIMIT_S = 5.0


class Kernel:
    """A real kernel and what its cells print."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self.manager = manager
        self.client = client

    @property
    def pid(self) -> int:
        return int(self.manager.provisioner.pid)  # type: ignore[union-attr]

    def begin(self, code: str) -> str:
        return str(self.client.execute(code))

    def run(self, code: str, *, timeout_s: float = 120.0) -> str:
        """What the cell printed; an error of the cell fails the test."""
        printed = self.finish(self.begin(code), timeout_s=timeout_s)
        assert "error" not in printed, printed
        return str(printed["text"])

    def finish(self, message: str, *, timeout_s: float = 60.0) -> dict[str, str]:
        printed = {"text": ""}
        deadline = time.monotonic() + timeout_s
        while True:
            found = self.client.get_iopub_msg(timeout=max(0.1, deadline - time.monotonic()))
            if found["parent_header"].get("msg_id") != message:
                continue
            content = found["content"]
            if found["msg_type"] == "stream":
                printed["text"] += content["text"]
            elif found["msg_type"] == "error":
                printed["error"] = "\n".join(content["traceback"])
            elif found["msg_type"] == "status" and content["execution_state"] == "idle":
                return printed

    def wait_for(self, word: str, *, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            found = self.client.get_iopub_msg(timeout=max(0.1, deadline - time.monotonic()))
            assert found["msg_type"] != "error", found["content"]
            if found["msg_type"] == "stream" and word in found["content"]["text"]:
                return


@pytest.fixture
def run_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    yield tmp_path
    for process in processes(tmp_path):
        process.kill()


@pytest.fixture
def kernel(run_dir: Path) -> Iterator[Callable[[], Kernel]]:
    started: list[Kernel] = []

    def start() -> Kernel:
        one = Kernel(*start_new_kernel(env={**os.environ, "XDG_RUNTIME_DIR": str(run_dir)}))
        started.append(one)
        one.run(START)
        return one

    yield start
    for one in started:
        one.client.stop_channels()
        one.manager.shutdown_kernel(now=True)


def processes(run_dir: Path) -> list[psutil.Process]:
    """Every process that lives in this test's runtime folder, kernels among them."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("XDG_RUNTIME_DIR") == str(run_dir) and process.status() != "zombie":
                process.info = {"pid": process.pid, "cmdline": " ".join(process.cmdline())}
                found.append(process)
        except psutil.Error:  # it ended while it was read
            continue
    return found


def left(run_dir: Path) -> dict[str, Any]:
    """What a deployment has left: processes other than kernels, files, shared memory."""
    mine = [p.info for p in processes(run_dir) if "ipykernel" not in p.info["cmdline"]]
    shared = [str(p) for p in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*")]
    return {"processes": mine, "files": [str(p) for p in (run_dir / "miinb").glob("*")], "shared": shared}


def until(condition: Callable[[], object], seconds: float, say: Callable[[], object] = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, say()
        time.sleep(0.05)


def nothing_left(run_dir: Path) -> None:
    until(lambda: not any(left(run_dir).values()), LIMIT_S, lambda: left(run_dir))


def test_stop_button_then_shutdown(kernel: Callable[[], Kernel], run_dir: Path) -> None:
    one = kernel()
    pids = "print(json.dumps([s.pid, *(r.pid for r in s.status().ranks)]))"
    before = json.loads(one.run("s = start(name='k'); " + pids))
    for code in (IN_STREAM, IN_CELL):
        # the rank sleeps while the button is pressed, so that the stream is certainly in its middle
        message = one.begin(code.replace("print(", f"import os; os.kill({before[1]}, 19); print("))
        one.wait_for("got")
        time.sleep(0.5)  # the cell goes on from its print to where it waits
        one.manager.interrupt_kernel()
        answer = one.finish(message, timeout_s=10.0)
        os.kill(before[1], signal.SIGCONT)
        if code == IN_STREAM:
            assert answer["error"].startswith("Interrupted: stopped after")
            assert answer["error"].count("\n") == 0
        assert one.run("print(c.cancelled, c.output_tokens < 450)").split() == ["True", "True"]
    awaits = f"import os; os.kill({before[1]}, 19); print('got'); await s.agenerate('Once', max_new_tokens=450)"
    message = one.begin(awaits)
    one.wait_for("got")
    time.sleep(0.5)
    one.manager.interrupt_kernel()
    assert "CancelledError" in one.finish(message, timeout_s=10.0)["error"]
    os.kill(before[1], signal.SIGCONT)
    free = "import time; time.sleep(1.2); st = s.status(); print(json.dumps([st.state, st.in_flight, st.queued]))"
    assert json.loads(one.run(free)) == ["ready", 0, 0]
    assert json.loads(one.run(pids)) == before
    assert one.run("print(s.generate('Once', max_new_tokens=3).usage.output_tokens)").strip() == "3"
    one.manager.shutdown_kernel()
    nothing_left(run_dir)


def test_interrupt_during_the_start_leaves_nothing(kernel: Callable[[], Kernel], run_dir: Path) -> None:
    one = kernel()
    message = one.begin("s = start(name='k')")
    until(lambda: (run_dir / "miinb" / "k" / "deployment.json").exists(), 30.0)
    one.manager.interrupt_kernel()
    assert "Interrupted: " in one.finish(message)["error"]
    nothing_left(run_dir)
    assert one.run("print(miinb.deployments())").strip() == "[]"


@pytest.mark.parametrize("how", ["restart", "SIGKILL", "SIGTERM"])
def test_the_deployment_ends_with_the_kernel(kernel: Callable[[], Kernel], run_dir: Path, how: str) -> None:
    one = kernel()
    one.run("s = start(name='k')")
    assert len(left(run_dir)["processes"]) == 3
    one.begin(IN_STREAM)
    one.wait_for("got")
    if how == "restart":
        one.manager.restart_kernel()
    else:
        os.kill(one.pid, signal.Signals[how])
    nothing_left(run_dir)


def test_a_persistent_deployment_and_a_second_kernel(kernel: Callable[[], Kernel], run_dir: Path) -> None:
    one, two = kernel(), kernel()
    one.run("o = start(name='mine'); s = start(name='kept', persist=True, idle_timeout_s=4.0)")
    assert two.run("print([d.name for d in miinb.deployments()])").strip() == "['kept', 'mine']"
    two.run("m = miinb.attach('mine'); m.keep(); print(m.status())")
    os.kill(one.pid, signal.SIGKILL)
    time.sleep(1.0)
    text = "k = miinb.attach('kept'); print(k.generate('Once', max_new_tokens=2).usage.output_tokens)"
    assert two.run(text).strip() == "2"
    assert two.run("print(m.state, m.status().persist)").split() == ["ready", "True"]
    two.run("m.stop()")
    until(lambda: not any(left(run_dir).values()), 4.0 + 1.0 + LIMIT_S, lambda: left(run_dir))  # idle, report, end
    assert two.run("print(k.state)").strip() == "lost"


def test_two_kernels_race_for_a_name(kernel: Callable[[], Kernel], run_dir: Path) -> None:
    both = [kernel(), kernel()]
    code = "\ntry: s = start(name='one'); print('won')\nexcept miinb.errors.DeploymentExists: print('lost')"
    messages = [one.begin(code) for one in both]
    answers = [one.finish(message)["text"].strip() for one, message in zip(both, messages, strict=True)]
    assert sorted(answers) == ["lost", "won"]
    assert [status.state for status in miinb.deployments()] == ["ready"]
    winner = both[answers.index("won")]
    assert winner.run("print(s.generate('Once', max_new_tokens=2).usage.output_tokens)").strip() == "2"
    winner.run("s.stop()")
    nothing_left(run_dir)
