"""The magics in a real kernel with a real deployment."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import start_new_kernel

from miinb.demo import tiny_model


class Kernel:
    """Runs cells and collects what they send."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def run(self, cell: str, timeout_s: float = 90) -> list[tuple[str, dict[str, Any]]]:
        """(type, content) of the messages that a cell sends, without the status ones."""
        seen: list[tuple[str, dict[str, Any]]] = []
        quiet = ("status", "execute_input")

        def hook(message: dict[str, Any]) -> None:
            if message["msg_type"] not in quiet:
                seen.append((message["msg_type"], message["content"]))

        reply = self.client.execute_interactive(cell, output_hook=hook, timeout=timeout_s, store_history=True)
        seen.append(("reply", reply["content"]))
        return seen

    def text(self, cell: str) -> str:
        """What a cell prints; its failure fails the test."""
        seen = self.run(cell)
        assert seen[-1][1]["status"] == "ok", seen
        return "".join(content["text"] for kind, content in seen if kind == "stream")

    def subshell(self) -> str:
        """A new one, as JupyterLab makes one for the messages of widgets; the test is skipped where there are none."""
        features = self.client.kernel_info(reply=True, timeout=30)["content"].get("supported_features", [])
        if "kernel subshells" not in features:
            pytest.skip("this ipykernel has no subshells")
        request = self.client.session.msg("create_subshell_request")
        self.client.control_channel.send(request)
        return str(self.client.get_control_msg(timeout=30)["content"]["subshell_id"])

    def tell(self, comm_id: str, subshell: str, **data: Any) -> None:
        """Send a widget a message, as a front end does."""
        message = self.client.session.msg("comm_msg", {"comm_id": comm_id, "data": data})
        message["header"]["subshell_id"] = subshell
        self.client.shell_channel.send(message)


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    folder = Path(tempfile.mkdtemp(prefix="mii", dir="/tmp"))  # short: unix sockets live in it
    env = {**os.environ, "XDG_RUNTIME_DIR": str(folder), "IPYTHONDIR": str(folder / "ipython"), "OMP_NUM_THREADS": "1"}
    manager, client = start_new_kernel(kernel_name="python3", env=env, startup_timeout=60)
    kernel = Kernel(client)
    try:
        assert kernel.text("%load_ext miinb") == ""
        kernel.run(f"folder = {str(tiny_model())!r}")
        seen = kernel.run("%mii start {folder} --name tiny --dtype fp32 --threads 1")
        card = next(content["data"] for kind, content in seen if kind == "execute_result")
        assert "Session tiny (ready)" in card["text/plain"]
        kernel.run("import miinb; s = miinb.attach('tiny')")
        yield kernel
        assert "Stopped tiny." in kernel.text("%mii stop")
        assert "No deployment is running" in kernel.text("print(get_ipython().run_line_magic('mii', 'list'))")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        shutil.rmtree(folder, ignore_errors=True)


def kinds(seen: list[tuple[str, dict[str, Any]]]) -> list[str]:
    return [kind for kind, _ in seen]


def test_a_prompt_grows_in_one_display_and_stays_static(kernel: Kernel) -> None:
    began = time.monotonic()
    seen = kernel.run('%mii gen "Once upon a time," -n 400 --ignore-eos')
    elapsed = time.monotonic() - began
    assert kinds(seen).count("display_data") == 1
    updates = [content for kind, content in seen if kind == "update_display_data"]
    assert 2 <= len(updates) <= 10 * elapsed + 3
    assert len({content["transient"]["display_id"] for content in updates}) == 1
    assert "400 tokens · first token" in updates[-1]["data"]["text/plain"]
    assert "reached max_new_tokens" in updates[-1]["data"]["text/html"]
    assert "execute_result" not in kinds(seen)


def test_where_an_answer_fails_nothing_waits_any_more(kernel: Kernel) -> None:
    seen = kernel.run('%mii gen "Once upon a time," -n 100000')
    assert seen[-1][1]["ename"] == "PromptTooLong"
    updates = [content["data"] for kind, content in seen if kind == "update_display_data"]
    assert updates[-1:] == [{"text/html": "", "text/plain": ""}]


def test_a_watch_is_one_display_until_the_stop_button(kernel: Kernel) -> None:
    stop = "import os, signal, threading\nthreading.Timer(2.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
    seen = kernel.run(stop + "w = get_ipython().run_line_magic('mii', 'status --watch')\nw.state")
    assert seen[-1][1]["status"] == "ok", seen
    assert kinds(seen).count("display_data") == 1
    assert 1 <= kinds(seen).count("update_display_data") <= 3
    assert kinds(seen).count("execute_result") == 1
    assert seen[-2][1]["data"]["text/plain"] == "'ready'"


def test_markdown_grows_and_stays_static(kernel: Kernel) -> None:
    seen = kernel.run('%mii gen "Once upon a time," -n 40 --format markdown')
    last = [content["data"]["text/html"] for kind, content in seen if kind == "update_display_data"][-1]
    assert "miinb-markdown" in last


def test_results_are_values(kernel: Kernel) -> None:
    assert kernel.text("r = %mii gen -q Hi -n 3\nprint(r.usage.output_tokens)") == "3\n"
    assert kinds(kernel.run("%mii gen Hi -n 3 -q")) == ["reply"]
    assert kernel.text("print(_.usage.output_tokens)") == "3\n"
    assert kinds(kernel.run("%mii gen Hi -n 3 -o kept;")) == ["reply"]
    assert "3 tokens" in kernel.run("kept")[0][1]["data"]["text/plain"]


def test_cells_under_other_magics(kernel: Kernel) -> None:
    assert "Wall time" in kernel.text("%%time\nx = get_ipython().run_cell_magic('mii', '-n 2', 'Hi')")
    assert kernel.text("%%capture shown\n%mii list") == ""
    assert "tiny" in kernel.text("shown()\nprint(shown.outputs[0].data['text/plain'])")


def test_it_works_while_the_event_loop_runs(kernel: Kernel) -> None:
    cell = "a = await s.agenerate('Hi', max_new_tokens=2)\n"
    assert kernel.text(cell + "b = s.generate('Hi', max_new_tokens=2)\nprint(a.text == b.text)") == "True\n"


def test_errors_are_one_line_and_fail_the_cell(kernel: Kernel) -> None:
    for cell, name in (
        ("%mii gen Hi --temprature 1", "UnknownOption"),
        ("%mii gen Hi -d nowhere", "DeploymentNotFound"),
        ("%mii gen Hi -n 100000", "PromptTooLong"),
        ("%mii start /no/such/folder", "ModelNotFound"),
        ("s.generate('Hi', max_new_tokens=0)", "InvalidRequest"),
    ):
        seen = kernel.run(cell)
        (error,) = [content for kind, content in seen if kind == "error"]
        assert error["ename"] == name
        assert len(error["traceback"]) == 1
        assert seen[-1][1]["status"] == "error"
        assert "stream" not in kinds(seen)


def test_commands_of_the_shell_stay_quiet(kernel: Kernel) -> None:
    assert kernel.text("!echo hello").strip() == "hello"


def test_completion_and_help_over_the_wire(kernel: Kernel) -> None:
    reply = kernel.client.complete("%mii gen --max", reply=True, timeout=30)["content"]
    assert reply["matches"] == ["--max-new-tokens"]
    assert "%mii gen --max"[reply["cursor_start"] : reply["cursor_end"]] == "--max"
    reply = kernel.client.complete("%%mii ti", reply=True, timeout=30)["content"]
    assert reply["matches"] == ["tiny"]
    reply = kernel.client.inspect("%mii", reply=True, timeout=30)["content"]
    assert "bench" in reply["data"]["text/plain"]


def test_cards_of_the_real_objects(kernel: Kernel) -> None:
    for cell, text in (
        ("s", "Session tiny (ready)"),
        ("s.status()", "Deployment tiny"),
        ("s.plan()", "Plan: optimized"),
    ):
        (content,) = [content for kind, content in kernel.run(cell) if kind == "execute_result"]
        assert text in content["data"]["text/plain"]
        assert "miinb-card" in content["data"]["text/html"]


def test_the_kernel_never_loads_torch(kernel: Kernel) -> None:
    assert kernel.text("import sys; print('torch' in sys.modules)") == "False\n"


def test_bars_are_replaced_text_and_go_away(kernel: Kernel) -> None:
    kernel.run("from miinb import cell")
    seen = kernel.run("with cell.bar(total=3, desc='<work>', leave=False, mininterval=0) as bar:\n    bar.update(2)")
    texts = [content["data"]["text/plain"] for kind, content in seen if kind.endswith("display_data")]
    assert kinds(seen)[0] == "display_data"
    assert "0/3" in texts[0]
    assert "2/3" in texts[1]
    assert texts[-1] == ""
    assert "&lt;work&gt;" in seen[0][1]["data"]["text/html"]
    assert kinds(kernel.run("with cell.quiet(), cell.bar(total=3) as bar:\n    bar.update(2)")) == ["reply"]


def test_a_conversation_outgrows_the_context(kernel: Kernel) -> None:
    """The oldest turns are left out and the panel says so; what cannot fit is an error, and the panel goes on."""
    kernel.run("p = s.panel(); p.controls.chat.value = True; p.controls.max_new_tokens.value = 100")
    kernel.run("def say(text):\n    p.prompt.value = text; p.run.click(); assert p.wait(60)\n    print(p.status.value)")
    assert "left out" not in kernel.text("say('Tell a story.')")
    for _ in range(6):
        said = kernel.text("say('Go on and on. ' * 12)")
        assert "Error" not in said
        if "left out to fit the context" in said:
            break
    else:
        raise AssertionError(said)
    turns = kernel.text("print(len(p.history))")
    assert "PromptTooLong" in kernel.text("say('a story ' * 600)")
    assert kernel.text("print(len(p.history), len(p.prompt.value))") == f"{turns.strip()} 4800\n"
    assert "tokens" in kernel.text("say('Short again.')")
    kernel.run("p.close()")


def test_a_closed_panel_leaves_what_it_showed_or_what_was_pinned(kernel: Kernel) -> None:
    for pins, left in ((0, "> Hello"), (1, "")):
        seen = kernel.run("p = s.panel(); display(p)")
        shown = next(content for kind, content in seen if kind == "display_data")
        assert "application/vnd.jupyter.widget-view+json" in shown["data"]
        kernel.run("p.prompt.value = 'Hello'; p.generate(); assert p.wait(60)")
        seen = kernel.run(f"{'p.pin(); ' * pins}p.close()")
        updates = [content for kind, content in seen if kind == "update_display_data"]
        (own,) = [one for one in updates if one["transient"] == shown["transient"]]
        assert own["data"].keys() == {"text/html", "text/plain"}
        assert own["data"]["text/plain"].startswith(left)
        assert bool(own["data"]["text/html"]) == bool(left)


def test_a_click_does_not_overtake_what_was_written_before_it_while_a_cell_runs(kernel: Kernel) -> None:
    subshell, click = kernel.subshell(), {"method": "custom", "content": {"event": "click"}}
    kernel.run("import time; p = s.panel(); field, seen = p.controls.max_new_tokens, []")
    heard = "def heard(_):\n    seen.append(field.value)\n    p.run.tooltip = f'{len(seen)}'"  # clicks change it
    kernel.run(f"{heard}\np.run.on_click(heard)")
    clicked, field = kernel.text("print(p.run.comm.comm_id, field.comm.comm_id)").split()
    wait = "end = time.monotonic() + 20\nwhile len(seen) < 2 and time.monotonic() < end: time.sleep(0.01)\nprint(seen)"
    kernel.tell(clicked, subshell, **click)
    while kernel.text("print(seen)") != "[128]\n":  # heard before the cell below runs, in whatever thread
        time.sleep(0.05)
    said = kernel.client.execute(wait)  # the main thread is busy with it
    kernel.tell(field, subshell, method="update", state={"value": 5}, buffer_paths=[])
    kernel.tell(clicked, subshell, **click)
    texts = []
    while texts[-1:] != ["idle"]:
        message = kernel.client.get_iopub_msg(timeout=60)
        if message["parent_header"].get("msg_id") == said:
            content = message["content"]
            texts.append(content.get("text") or content.get("execution_state", ""))
    assert "[128, 5]" in "".join(texts), texts
    kernel.run("p.close()")
