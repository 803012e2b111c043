"""A notebook as an app: Voila shows its panel to whoever opens the page, and all of them share one deployment."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.browser

CELL = """import miinb
from miinb.demo import tiny_model

try:  # the first visitor's kernel starts it
    session = miinb.attach("app")
except miinb.errors.DeploymentNotFound:
    session = miinb.Session(str(tiny_model()), name="app", dtype="fp32", persist=True)
session.panel()"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    folder = Path(tempfile.mkdtemp(prefix="app", dir="/tmp"))  # short: unix sockets live below it
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "app.ipynb")
    (folder / "run").mkdir(mode=0o700)
    env = {**os.environ, "XDG_RUNTIME_DIR": str(folder / "run"), "OMP_NUM_THREADS": "1"}
    env |= {f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in ("CONFIG", "RUNTIME", "DATA")}
    port = free_port()
    command = [sys.executable, "-m", "voila", "app.ipynb", "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", port)):
                    break
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
    finally:
        subprocess.run([sys.executable, "-m", "miinb", "stop", "app"], env=env, check=False, timeout=60)
        server.terminate()
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def test_two_visitors_ask_one_deployment(url: str, page: Page) -> None:
    second = page.context.browser.new_page()  # type: ignore[union-attr]  # a page of a browser
    for number, visitor in enumerate((page, second)):
        visitor.goto(url, timeout=90_000)
        visitor.locator(".miinb-prompt textarea").fill("Once upon a time,")
        visitor.locator(".miinb-generate").click()
        expect(visitor.locator(".miinb-status")).to_contain_text("first token", timeout=30_000)
        expect(visitor.locator(".miinb-output")).to_contain_text("there was a")
        assert "import miinb" not in visitor.locator("body").inner_text()
        if number:
            chosen = visitor.locator(".miinb-deployment select")
            assert chosen.locator("option").all_inner_texts() == ["app"]
    second.close()
