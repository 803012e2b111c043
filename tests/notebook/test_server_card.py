from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from panel_checks import check_controls, html_of, nothing_left, until
from standin import StandIn

from miinb import Session, hardware
from miinb.demo import tiny_model
from miinb.errors import Unavailable
from miinb.messages import Phase
from miinb.notebook import server_card
from miinb.notebook.panels import panel
from miinb.notebook.server_card import ServerCard

PROBE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def session() -> StandIn:
    return StandIn()


@pytest.fixture
def shown(session: StandIn) -> Iterator[ServerCard]:
    made = ServerCard(session, every_s=0.01)
    yield made
    made.close()


def test_it_says_what_runs_and_looks_again(shown: ServerCard, session: StandIn) -> None:
    for word in ("ready", "/models/tiny", "optimized, fp32 on cpu", "1 min 15 s", "3 done, 0 in flight, 0 waiting"):
        assert word in shown.output.value
    assert "1.61 GB" in shown.output.value
    shown.watch()
    session.in_flight = 2
    until(lambda: "2 in flight" in shown.output.value)
    session.state = "lost"
    until(lambda: "was killed, or does not answer" in shown.status.value)
    assert "✕" in shown.output.value
    assert "1.61 GB" not in shown.output.value
    assert shown.ending.disabled
    assert shown.keeping.disabled
    assert not shown.again.disabled


def test_stop_asks_first(shown: ServerCard, session: StandIn) -> None:
    session.in_flight = 1
    shown.fresh.click()
    until(lambda: "1 in flight" in shown.output.value)
    shown.ending.click()
    assert shown.confirmation.layout.display == "flex"
    assert "Stop tiny? 1 request would be lost." in shown.question.value
    assert "1 request would be lost" in shown.status.value
    shown.no.click()
    assert shown.confirmation.layout.display == "none"
    shown.yes.click()  # nothing was asked
    assert session.state == "ready"
    shown.ending.click()
    shown.yes.click()
    assert shown.wait(10)
    assert session.state == "stopped"
    assert "tiny has stopped" in shown.status.value
    assert "no process is left" in shown.output.value


def test_a_question_ends_with_the_deployment(shown: ServerCard, session: StandIn) -> None:
    shown.watch()
    shown.ending.click()
    assert shown.confirmation.layout.display == "flex"
    session.state = "stopped"  # by another notebook
    until(lambda: "no process is left" in shown.status.value)
    assert shown.confirmation.layout.display == "none"


def test_restart_asks_where_requests_run_and_shows_phases(
    shown: ServerCard, session: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting = StandIn(state="starting", phase=Phase("load", 3, 12, "weights"))
    monkeypatch.setattr("miinb.deployments", lambda: [starting.status()], raising=False)
    session.gate = threading.Event()
    shown.watch()
    shown.again.click()
    until(lambda: "Phase: load 3 of 12 weights" in shown.output.value)
    assert shown.ending.disabled
    assert shown.again.disabled
    session.gate.set()
    assert shown.wait(10)
    assert "tiny runs again" in shown.status.value
    assert "Phase" not in shown.output.value
    session.in_flight = 3
    until(lambda: "3 in flight" in shown.output.value)
    shown.again.click()
    assert "Restart tiny? 3 requests would be lost." in shown.question.value
    assert [call[0] for call in session.calls] == ["restart"]


def test_keep_is_off_once_it_is_kept(shown: ServerCard, session: StandIn) -> None:
    shown.keeping.click()
    assert shown.wait(10)
    assert session.persist
    assert "outlives this notebook" in shown.status.value
    assert shown.keeping.disabled
    assert "persistent" in shown.output.value


def test_errors_are_a_line(shown: ServerCard, session: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: StandIn) -> None:
        raise Unavailable("It <ended>.")

    monkeypatch.setattr(StandIn, "keep", refuse)
    shown.keeping.click()
    assert shown.wait(10)
    assert "Unavailable: It &lt;ended&gt;." in shown.status.value
    assert not shown.keeping.disabled


def test_plan_and_logs_come_when_they_are_opened(shown: ServerCard, session: StandIn) -> None:
    shown.watch()
    assert not shown.plan_text.value
    shown.plan.switch.value = True
    shown.logs.switch.value = True
    until(lambda: "attention" in shown.plan_text.value and "loaded" in shown.logs_text.value)
    session.log += "\nmore"
    until(lambda: "more" in shown.logs_text.value)


def test_hostile_text_is_no_markup() -> None:
    session = StandIn(
        name=PROBE, model=PROBE, log=PROBE + "\x1b[31m", state="starting", phase=Phase(PROBE, 1, 2, PROBE)
    )
    shown = ServerCard(session, every_s=0.01)
    shown.plan.switch.value = True
    shown.logs.switch.value = True
    until(lambda: shown.logs_text.value)
    session.state = "ready"
    until(lambda: shown.plan_text.value)
    shown.ending.click()
    assert "<img" not in html_of(shown)
    assert "\x1b" not in html_of(shown) + shown.snapshot().text
    shown.close()


def test_it_ends_by_itself_and_refresh_goes_on(session: StandIn) -> None:
    shown = ServerCard(session, every_s=0.01, for_s=0.0)
    shown.watch()
    until(lambda: "no longer refreshed" in shown.output.value)
    assert not [thread for thread in threading.enumerate() if thread.name == "miinb-panel-card"]
    shown._for_s = 600.0
    shown.fresh.click()
    until(lambda: "no longer refreshed" not in shown.output.value)
    shown.close()


def test_it_rests_while_it_is_out_of_sight(shown: ServerCard, session: StandIn) -> None:
    shown._view_count = 1
    shown.watch()
    session.in_flight = 1
    until(lambda: "1 in flight" in shown.output.value)
    shown._view_count = 0
    time.sleep(0.1)  # a look that had begun
    asked: list[Any] = []
    session.status = lambda: asked.append(1)  # type: ignore[method-assign,func-returns-value,assignment,return-value]
    time.sleep(0.1)
    assert not asked
    del session.status
    session.in_flight = 2
    shown._view_count = 1
    until(lambda: "2 in flight" in shown.output.value)


def test_memory_of_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = hardware.Gpu(0, 3, "H200", 6 << 30, 0, (9, 0))
    monkeypatch.setattr(server_card, "_gpus", lambda: {3: gpu})
    html = server_card.memory_html(StandIn(gpu=3).status())
    assert "memory of GPU 3 (H200): 1.61 GB of 6.44 GB" in html
    assert "width:25.0%" in html


def test_controls_and_snapshot(shown: ServerCard) -> None:
    check_controls(shown, 7)
    shown.pin()
    assert "Deployment tiny" in shown.snapshot().text
    assert "pinned below" in shown.status.value


def test_close_leaves_nothing(session: StandIn) -> None:
    with nothing_left():
        shown = panel(session, "server")
        shown.watch()
        shown.close()
    assert session.state == "ready"


def test_a_real_deployment_is_restarted_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with Session(tiny_model(), name="tiny", device="cpu", options={"threads": 1}) as session:
        shown = session.panel("server")
        seen: list[str] = []
        shown.output.observe(lambda change: seen.append(change["new"]), "value")
        shown._every_s = 0.05
        shown.watch()
        shown.restart()
        assert shown.wait(120)
        assert "runs again" in shown.status.value
        assert any("starting" in html for html in seen)
        assert session.generate("Once", max_new_tokens=2).usage.output_tokens == 2
        shown.end()
        assert shown.wait(60)
        assert session.state == "stopped"
        assert "stopped" in shown.output.value
        shown.close()
