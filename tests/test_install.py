"""A wheel built from the checkout works outside it: models, notebooks, protocol and all."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by pip without a network."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run([*command, str(CHECKOUT)], check=True, timeout=300)
    return next(out.glob("miinb-*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_what_the_package_reads(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in (
        "miinb/py.typed",
        "miinb/rpc/inference.proto",
        "miinb/demo/tiny/model.safetensors",
        "miinb/demo/tiny/chat_template.jinja",
        "miinb/demo/notebooks/01_first_answer.ipynb",
        *(str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "miinb" / "demo").rglob("*.safetensors")),
    ):
        assert needed in names, f"{needed} is not in the wheel"
    assert not [name for name in names if name.startswith("tests/")]


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """The demonstration with the tiny model, in a folder of its own, from the installed wheel alone."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", str(venv)], check=True, timeout=120)
    python = venv / "bin" / "python"
    site = next((venv / "lib").glob("python*")) / "site-packages"
    # a venv in a venv sees the outermost packages only: the dependencies come by a path file
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")) + "\n")
    install = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--force-reinstall",
        str(wheel),
    ]
    subprocess.run([*install, str(wheel)], check=True, timeout=120)
    work = tmp_path / "work"
    work.mkdir()
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    where = subprocess.run(
        [str(python), "-c", "import miinb; print(miinb.__file__)"],
        cwd=work, env=clean, check=True, capture_output=True, text=True, timeout=60,
    ).stdout  # fmt: skip
    assert str(venv) in where
    done = subprocess.run(
        [str(venv / "bin" / "miinb"), "demo", "--tiny", "-n", "16"],
        cwd=work, env=clean, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Once upon a time, there was a" in done.stdout
    assert (work / "miinb-demo.png").stat().st_size > 10_000
