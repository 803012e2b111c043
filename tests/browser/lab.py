"""A real JupyterLab in headless Chromium, and a notebook in it, for tests that click."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]

#: Resolves when the notebook's kernel takes requests; what is sent before is lost.
_READY = """async () => {
  const app = window.jupyterapp;
  await app.restored;
  const notebook = app.shell.currentWidget;
  await notebook.context.ready;
  await notebook.sessionContext.ready;
  const kernel = notebook.sessionContext.session.kernel;
  await kernel.info;
  while (kernel.status !== 'idle' || kernel.connectionStatus !== 'connected')
    await new Promise(done => setTimeout(done, 50));
}"""
_RUN = """async (index) => {
  const app = window.jupyterapp;
  const notebook = app.shell.currentWidget.content;
  notebook.activeCellIndex = index;
  await app.commands.execute('notebook:run-cell');
}"""
_START = """(index) => {
  const app = window.jupyterapp;
  app.shell.currentWidget.content.activeCellIndex = index;
  app.commands.execute('notebook:run-cell');
}"""
_OUTPUTS = """(index) =>
  window.jupyterapp.shell.currentWidget.content.widgets[index].model.sharedModel.toJSON().outputs"""

_PROMPT = """(index) =>
  window.jupyterapp.shell.currentWidget.content.widgets[index].inputArea.promptNode.textContent"""


class Lab:
    """A JupyterLab server with private folders. `folder` holds its notebooks and the deployments' state."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lab", dir="/tmp"))  # short: unix sockets live below it
        (self.folder / "run").mkdir(mode=0o700)
        self.env = {
            **os.environ,
            "JUPYTER_CONFIG_DIR": str(self.folder / "config"),
            "JUPYTER_RUNTIME_DIR": str(self.folder / "jupyter"),
            "JUPYTER_DATA_DIR": str(self.folder / "data"),
            "IPYTHONDIR": str(self.folder / "ipython"),
            "XDG_RUNTIME_DIR": str(self.folder / "run"),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.port=0"]
        command += ["--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"]
        command += [
            f"--LabApp.workspaces_dir={self.folder}/spaces",
            f"--LabApp.user_settings_dir={self.folder}/settings",
        ]
        quiet = self.folder / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
        quiet.parent.mkdir(parents=True)
        quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
        self._log = (self.folder / "lab.log").open("wb")
        self._server = subprocess.Popen(command, cwd=self.folder, env=self.env, stdout=self._log, stderr=self._log)
        self.url = self._wait_for_url()

    def _wait_for_url(self) -> str:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            for path in (self.folder / "jupyter").glob("jpserver-*.json"):
                return str(json.loads(path.read_text())["url"])
            assert self._server.poll() is None, (self.folder / "lab.log").read_text()
            time.sleep(0.1)
        raise AssertionError("JupyterLab did not start: " + (self.folder / "lab.log").read_text())

    def write(self, name: str, cells: Sequence[str]) -> None:
        """Write a notebook of these cells."""
        made = [
            {"cell_type": "code", "id": f"c{i}", "metadata": {}, "source": text, "outputs": [], "execution_count": None}
            for i, text in enumerate(cells)
        ]
        spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        notebook = {"cells": made, "metadata": spec, "nbformat": 4, "nbformat_minor": 5}
        (self.folder / name).write_text(json.dumps(notebook))

    def close(self) -> None:
        """End the server and its kernels."""
        self._server.terminate()
        try:
            self._server.wait(20)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait(10)
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Notebook:
    """An open notebook: run cells, read outputs, find widgets."""

    def __init__(self, lab: Lab, page: Any, name: str) -> None:
        self.page = page
        self._url = f"{lab.url}lab/tree/{name}?reset"
        self.open()

    def open(self) -> None:
        """Load the page, also once more."""
        self.page.goto("about:blank")
        self.page.goto(self._url, timeout=60_000)
        self.page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.sessionContext", timeout=60_000)
        self.ready()

    def save(self) -> None:
        """Write the notebook's file."""
        self.page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")

    def ready(self) -> None:
        """Wait until the kernel is idle."""
        self.page.evaluate(_READY)

    def run(self, index: int) -> list[dict[str, Any]]:
        """Run a cell to its end; its outputs."""
        self.page.evaluate(_RUN, index)
        self.ready()
        return self.outputs(index)

    def start(self, index: int) -> None:
        """Run a cell and do not wait."""
        self.page.evaluate(_START, index)

    def outputs(self, index: int) -> list[dict[str, Any]]:
        """A cell's outputs as the notebook file would hold them."""
        found: list[dict[str, Any]] = self.page.evaluate(_OUTPUTS, index)
        return found

    def text(self, index: int) -> str:
        """The plain text of a cell's outputs, one after the other."""
        parts = []
        for output in self.outputs(index):
            plain = output.get("text") or output.get("data", {}).get("text/plain") or output.get("traceback", "")
            parts.append("".join(plain))
        return "\n".join(parts)

    def prompt(self, index: int) -> str:
        """What stands before a cell: "[*]:" while it runs."""
        return str(self.page.evaluate(_PROMPT, index))

    def find(self, css: str) -> Any:
        """The visible element of a panel with this test hook; inputs inside it included."""
        return self.page.locator(f".miinb-{css}").last

    def command(self, name: str) -> None:
        """Run one of JupyterLab's commands."""
        self.page.evaluate("(name) => { window.jupyterapp.commands.execute(name); }", name)

    def theme(self, name: str) -> None:
        """Change the theme."""
        self.page.evaluate("(theme) => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", name)
        self.page.wait_for_timeout(1000)
