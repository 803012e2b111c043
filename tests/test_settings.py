"""Settings of the commands: sources, their order, and what is told of a wrong one."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from miinb import cli
from miinb.commands.settings import PACKAGE, Settings, load, user_file
from miinb.errors import ConfigError, InvalidValue, MiinbError, UnknownOption, near


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("MIINB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    project = tmp_path / "project"
    (project / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(project / "deep" / "er")
    return project


def write_user_file(text: str) -> Path:
    user_file().parent.mkdir(parents=True, exist_ok=True)
    user_file().write_text(text)
    return user_file()


def test_later_sources_win(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyproject = project / "pyproject.toml"
    pyproject.write_text("[tool.miinb]\nmax_new_tokens = 1\nstream_hz = 1\nprice_usd_per_gpu_hour = 1.5\n")
    own = write_user_file("max_new_tokens = 2\nstream_hz = 2\n")
    monkeypatch.setenv("MIINB_MAX_NEW_TOKENS", "3")
    monkeypatch.setenv("MIINB_SHORT_ERRORS", "off")
    settings, sources = load()
    assert (settings.price_usd_per_gpu_hour, settings.stream_hz, settings.max_new_tokens) == (1.5, 2.0, 3)
    assert settings.short_errors is False
    assert settings.default_session == ""
    assert sources == {
        **dict.fromkeys(Settings.model_fields, PACKAGE),
        "price_usd_per_gpu_hour": f"{pyproject} [tool.miinb]",
        "stream_hz": str(own),
        "max_new_tokens": "environment MIINB_MAX_NEW_TOKENS",
        "short_errors": "environment MIINB_SHORT_ERRORS",
    }


def test_only_the_nearest_pyproject_counts(project: Path) -> None:
    (project / "pyproject.toml").write_text("[tool.miinb]\nmax_new_tokens = 1\n")
    (project / "deep" / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    assert load()[0] == Settings()


def test_a_folder_in_a_file_is_beside_that_file(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "pyproject.toml").write_text("[tool.miinb]\nrun_dir = 'runs'\n")
    assert load()[0].run_dir == str(project / "runs")
    (project / "pyproject.toml").write_text("[tool.miinb]\nrun_dir = '/data/runs'\n")
    assert load()[0].run_dir == "/data/runs"
    monkeypatch.setenv("MIINB_RUN_DIR", "here")
    assert load()[0].run_dir == "here"  # of the working folder, as any path that is typed


def test_empty_variables_and_other_peoples_mistakes_do_not_count(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "pyproject.toml").write_bytes(b"[project\nname = '\xff'\n")
    monkeypatch.setenv("MIINB_STREAM_HZ", "")
    monkeypatch.setenv("MIINB_SHORT_ERRORS", " ")
    assert load() == (Settings(), dict.fromkeys(Settings.model_fields, PACKAGE))
    (project / "pyproject.toml").write_bytes(b"[tool.miinb]\nstream_hz = '\xff'\n")
    with pytest.raises(ConfigError, match="is not TOML"):
        load()


@pytest.mark.parametrize(
    ("place", "text", "error", "told"),
    [
        ("project", "[tool.miinb]\nmax_new_token = 1\n", UnknownOption, "Did you mean 'max_new_tokens'?"),
        ("project", "[tool.miinb]\nmax_new_tokens = 'x'\n", InvalidValue, "max_new_tokens"),
        ("project", "[tool.miinb]\nmax_new_tokens = -1\n", InvalidValue, "greater than or equal to 0"),
        ("project", "[tool]\nmiinb = 3\n", InvalidValue, "a table of settings"),
        ("project", "[tool.miinb\n", ConfigError, "is not TOML"),
        ("user", "stream_hz = 0\n", InvalidValue, "stream_hz"),
        ("user", "nonsense = 1\n", UnknownOption, "'nonsense'"),
        ("MIINB_MAX_NEW_TOKENS", "x", InvalidValue, "'x' is not a whole number"),
        ("MIINB_STREAM_HZ", "100", InvalidValue, "less than or equal to 50"),
        ("MIINB_SHORT_ERRORS", "maybe", InvalidValue, "neither true nor false"),
        ("MIINB_MAX_TOKENS", "3", UnknownOption, "Did you mean MIINB_MAX_NEW_TOKENS?"),
    ],
)
def test_a_wrong_setting_is_told_with_its_source(
    project: Path, monkeypatch: pytest.MonkeyPatch, place: str, text: str, error: type[MiinbError], told: str
) -> None:
    if place == "project":
        source = str(project / "pyproject.toml")
        Path(source).write_text(text)
    elif place == "user":
        source = str(write_user_file(text))
    else:
        source = f"environment {place}"
        monkeypatch.setenv(place, text)
    with pytest.raises(error, match=re.escape(told)) as caught:
        load()
    assert caught.value.message.startswith(source)


def test_the_projects_other_variables_are_not_taken_for_settings() -> None:
    package = Path(cli.__file__).parent
    sources = [*package.rglob("*.py"), *package.rglob("*.ch"), *Path(__file__).parent.rglob("*.py")]
    found = {name for path in sources for name in re.findall(r"MIINB_([A-Z_]+)\b", path.read_text())}
    assert {"DEMO_MODEL", "INSTANCE"} <= found
    meant = {"MAX_NEW_TOKENS", "STREAM_HZ", "SHORT_ERRORS", "MAX_TOKENS"}
    for name in found - meant - {field.upper() for field in Settings.model_fields}:
        assert near(name.lower(), Settings.model_fields) is None, name


def test_the_program_honors_them(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "pyproject.toml").write_text("[tool.miinb]\nmax_new_tokens = 5\n")
    assert cli.main(["config"]) == 0
    assert "[tool.miinb]" in capsys.readouterr().out
    (project / "pyproject.toml").write_text("[tool.miinb]\nmax_tokens = 5\n")
    assert cli.main(["list"]) == 2
    told = capsys.readouterr().err
    assert str(project / "pyproject.toml") in told
    assert "max_new_tokens" in told
    assert cli.main(["help", "gen"]) == 0


def test_a_folder_for_runs(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from miinb import commands
    from miinb.commands.context import Context

    class Measured:
        saved: list[str] = []  # noqa: RUF012

        def bench(self, **fields: object) -> Measured:
            return self

        def save(self, folder: str) -> str:
            self.saved.append(folder)
            return folder

        report = save

    measured = Measured()
    context = Context(settings=Settings(run_dir="kept"))
    monkeypatch.setattr(context, "session", lambda name: measured)
    for words in ([], ["--save", "elsewhere"]):
        command = commands.find("bench")
        commands.execute(context, command, commands.parse(command, words, prog="miinb"))
    assert measured.saved == ["kept", "elsewhere"]
