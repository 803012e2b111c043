from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import miinb
from miinb import cli, commands, registry
from miinb.commands import generating, keeping, measuring
from miinb.commands.options import BENCH, DEPLOYMENT, ENGINE, GENERATION
from miinb.config import BenchConfig, DeploymentConfig, EngineOptions, GenerationParams
from miinb.demo import tiny_model
from miinb.errors import Interrupted, InvalidValue
from tests.bench.test_records import make as made


@pytest.mark.parametrize(
    ("options", "config", "elsewhere"),
    [
        (DEPLOYMENT, DeploymentConfig, {"model", "options"}),
        (ENGINE, EngineOptions, {"ds_config"}),  # a nested table, for --config and cells
        (GENERATION, GenerationParams, set()),
        (BENCH, BenchConfig, {"prompts"}),
    ],
)
def test_every_field_is_an_option(options: tuple, config: type, elsewhere: set[str]) -> None:
    assert {option.target for option in options} == set(config.model_fields) - elsewhere


def test_options_do_not_clash_and_every_command_builds_its_help() -> None:
    for name in commands.COMMANDS:
        assert name in commands.help_text("miinb", name)


def test_the_contract_names_every_command() -> None:
    wanted = (
        "start attach list use status plan stop restart keep logs gen chat predict bench compare plot runs panel "
        "models check gpus env doctor config help reset demo"
    )
    assert set(commands.COMMANDS) == set(wanted.split())


def test_values_have_the_types_of_their_fields() -> None:
    words = ["m", "--gpus", "0,1;2,3", "--tensor-parallel", "2", "--idle-timeout-s", "5", "--no-prefix-cache"]
    values = commands.parse(commands.find("start"), words, prog="miinb")
    assert values["gpus"] == [[0, 1], [2, 3]]
    assert (values["tensor_parallel"], values["idle_timeout_s"], values["prefix_cache"]) == (2, 5.0, False)
    values = commands.parse(commands.find("bench"), ["-s", "a,b", "--concurrency", "1,4"], prog="miinb")
    assert (values["deployments"], values["concurrency"]) == (["a", "b"], [1, 4])
    with pytest.raises(InvalidValue, match=r"--concurrency: '1,,4' is not of the right form"):
        commands.parse(commands.find("bench"), ["--concurrency", "1,,4"], prog="miinb")
    values = commands.parse(commands.find("plot"), ["--run", "a,b", "ecdf"], prog="miinb")
    assert (values["kind"], values["run"]) == ("ecdf", ["a", "b"])
    words = ["--stop", r"\n", "--stop", r"a\\n", "--logit-bias", "5=-1", "--presence-penalty", "-0.5"]
    values = commands.parse(commands.find("gen"), words, prog="miinb")
    assert values["stop"] == ["\n", r"a\n"]
    assert (values["logit_bias"], values["presence_penalty"]) == ({5: -1.0}, -0.5)


def test_charts_of_the_command_are_the_charts_that_exist() -> None:
    from miinb.bench import charts

    assert set(keeping.CHARTS) == set(charts.KINDS)


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ([], 2, "miinb COMMAND"),
        (["--help"], 0, "bench"),
        (["--version"], 0, miinb.__version__),
        (["help", "gen"], 0, "--max-new-tokens"),
        (["gen", "--help"], 0, "--max-new-tokens"),
        (["strat"], 2, "Did you mean 'start'?"),
        (["start"], 2, "which model"),
        (["start", "m", "--dtyp", "fp32"], 2, "Did you mean '--dtype'?"),
        (["gen", "Hi", "-o", "x"], 2, "no option '-o'"),
        (["panel"], 2, "need a notebook"),
        (["check"], 2, "which model"),
        (["stop", "no-such-deployment"], 1, "no-such-deployment"),
    ],
)
def test_exit_codes_and_messages(words: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == code
    shown = capsys.readouterr()
    assert text in (shown.out if not words or code == 0 else shown.err)


@pytest.mark.parametrize(
    ("command", "kind", "first"),
    [
        ("gpus", list, ""),
        ("env", dict, "python"),
        ("doctor", list, "what"),
        ("config", list, "setting"),
    ],
)
def test_json(capsys: pytest.CaptureFixture[str], command: str, kind: type, first: str) -> None:
    assert cli.main([command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert isinstance(told, kind)
    assert not first or first in (told if kind is dict else told[0])


def test_the_reference_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help", "--markdown"]) == 0
    page = Path(__file__).parent.parent / "docs" / "commands.md"
    assert page.read_text() == capsys.readouterr().out, "python -m miinb help --markdown > docs/commands.md"


def test_help_tells_defaults() -> None:
    assert "most new tokens of an answer (default: 128)" in " ".join(commands.help_text("miinb", "gen").split())
    assert "(default: 50)" in commands.help_text("miinb", "logs")


def test_a_status_is_written_over_the_last_one_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Output(io.StringIO):
        terminal = True

        def isatty(self) -> bool:
            return self.terminal

    output = Output()
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setenv("COLUMNS", "10")
    place = commands.PlainScreen().place()
    place.show("one\n" + "x" * 25)  # four lines of this terminal
    place.show("two \x1b[2J")
    assert output.getvalue() == "one\n" + "x" * 25 + "\n\x1b[4F\x1b[Jtwo ␛[2J\n"
    output.terminal = False
    commands.PlainScreen().place().show("three")
    assert output.getvalue().endswith("[2J\nthree\n")


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tempfile.mkdtemp(prefix="mii", dir="/tmp")  # short: unix sockets live in it
    monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    cli.main(["stop", "--all"])
    shutil.rmtree(folder)


def test_runs_are_found_where_the_settings_keep_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MIINB_RUN_DIR", str(tmp_path / "kept"))
    assert cli.main(["runs"]) == 0
    assert "There is no benchmark run yet" in capsys.readouterr().out
    for number, arm in (("1", "early"), ("2", "late")):
        made(f"2026013{number}-000000-aaaa", arms=(arm,)).save(tmp_path / "kept")
    assert cli.main(["runs"]) == 0
    shown = capsys.readouterr().out
    assert "early" in shown
    assert "late" in shown
    assert cli.main(["runs", "show"]) == 0
    shown = capsys.readouterr().out
    assert "late" in shown  # the last one
    assert "early" not in shown
    assert cli.main(["runs", "drop", "20260131-000000-aaaa"]) == 2
    assert "not in memory" in capsys.readouterr().err


def test_a_deployment_from_start_to_stop(
    state: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str) -> str:
        assert cli.main(words) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    start = ["start", str(tiny_model()), "--name", "cli", "--dtype", "fp32", "--idle-timeout-s", "90"]
    shown = said(*start)
    assert "Session cli (ready)" in shown
    assert "step_budget" in shown
    planned = said("plan", "cli")
    assert "step_budget" in planned and "parity" in planned  # noqa: PT018
    assert planned == said("plan", "-d", "cli") == said("plan")
    assert cli.main(["plan", "cli", "--dtype", "int8"]) == 2
    assert "dtype goes with a model" in capsys.readouterr().err
    assert "int8" in said("plan", str(tiny_model()), "--dtype", "int8")
    assert cli.main(start) == 1
    assert "cli" in capsys.readouterr().err
    assert said("list").splitlines()[2].endswith("persistent")
    (listed,) = json.loads(said("list", "--json"))
    assert (listed["name"], listed["state"], listed["persist"]) == ("cli", "ready", True)
    assert listed["owner"] == "persistent"
    words = ["gen", "Once upon a time,", "-n", "12"]
    assert said(*words) == said(*words, "-d", "cli", "--no-stream")
    for text, dash in (("Once upon a time,\n", ["-"]), ("Once upon a time,", [])):  # as `echo ... | miinb gen`
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert said("gen", *dash, "-n", "12") == said(*words)
    assert cli.main(["gen", "Hi", "-n", "9999"]) == 1
    assert "max_new_tokens" in capsys.readouterr().err
    assert "compiled" in said("logs") or "ready" in said("logs")
    assert "optimized, fp32 on cpu" in said("status", "cli")
    assert json.loads(said(*words, "--format", "json"))["usage"]["output_tokens"] == 12
    assert said("logs", "--grep", "miinb.worker INFO ready", "-n", "1").count("INFO ready") == 1
    assert said("logs", "--level", "error") == "No line of the last 100,000 of a log matches.\n"
    assert "INFO ready" in said("logs", "cli", "--follow", "0.2s")
    assert said("stop", "--grace", "1s") == "Stopped cli.\n"
    assert "No deployment is running" in said("list")


def test_force_ends_what_nobody_can_join(
    state: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["start", str(tiny_model()), "--name", "old", "--dtype", "fp32", "--idle-timeout-s", "90"]) == 0
    monkeypatch.setattr(registry, "__version__", "9.9")  # as if another version had started it
    assert cli.main(["stop", "old"]) == 1
    assert "runs miinb" in capsys.readouterr().err
    assert cli.main(["stop", "--all"]) == 1
    assert "miinb stop --all --force" in capsys.readouterr().err
    assert cli.main(["stop", "old", "--force"]) == 0
    assert capsys.readouterr().out == "Stopped old.\n"
    assert registry.entries() == []
    assert cli.main(["stop", "old", "--force"]) == 1


@pytest.mark.parametrize("command", [["models"], ["help"], ["gpus", "--json"]])
def test_a_full_disk_is_told(command: list[str]) -> None:
    with open("/dev/full", "w") as full:
        program = [sys.executable, "-m", "miinb.cli", *command]
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "miinb: the output cannot be written: No space left on device.\n"


def test_the_program_starts_light() -> None:
    heavy = ("torch", "IPython", "pandas", "grpc")
    probe = f"import sys; from miinb import cli; cli.main(['help']); print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True).stdout
    assert out.splitlines()[-1] == "[]"


STOPPED = "stopped at step 3 of 9; the deployment lives on."


@pytest.mark.parametrize(
    ("error", "said"),
    [(KeyboardInterrupt(), "stopped."), (Interrupted(STOPPED, hint="Look there."), f"{STOPPED} Look there.")],
)
def test_ctrl_c_says_one_line(
    error: KeyboardInterrupt, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise error

    monkeypatch.setattr(commands, "execute", stopped)
    assert cli.main(["list"]) == 130
    assert capsys.readouterr().err == f"miinb: {said}\n"


@pytest.mark.parametrize("name", ["stop", "restart", "status", "logs", "keep", "reset", "plan", "bench"])
def test_a_line_names_one_deployment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    context = commands.Context(prog="%mii")
    asked: list[str | None] = []

    def session(name: str | None = None) -> None:
        asked.append(name)
        raise KeyError(name)

    monkeypatch.setattr(context, "session", session)
    monkeypatch.setattr(context, "names", lambda: ["a", "b"])
    command = commands.find(name)
    placed = ["-s", "a"] if name == "bench" else ["a"]

    def run(*words: str) -> None:
        commands.execute(context, command, commands.parse(command, list(words), prog="%mii"))

    with pytest.raises(InvalidValue, match=rf"{name}: .*a'? and -d b"):
        run(*placed, "-d", "b")
    for words in ([*placed, "-d", "a"], placed, ["-d", "a"]):
        with pytest.raises(KeyError):
            run(*words)
    assert asked == ["a"] * 3


def test_a_terminal_is_told_what_lasts_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["use", "a"]) == 2
    assert "export MIINB_DEFAULT_SESSION=NAME" in capsys.readouterr().err
    assert cli.main(["reset", "a"]) == 2
    assert "a terminal's chat is one turn" in capsys.readouterr().err
    for prog, lasting in (("miinb", "export MIINB_DEFAULT_SESSION=NAME"), ("%mii", "%mii use NAME")):
        context = commands.Context(prog=prog)
        monkeypatch.setattr(context, "names", lambda: ["a", "b"])
        with pytest.raises(InvalidValue, match=lasting):
            context.session()
    assert "in a terminal one turn" in commands.help_text("miinb", "chat").replace("\n", " ")


@pytest.mark.parametrize(
    "text", ["---\none\n\nline\n---\ntwo\n---\n", "one\n\nline\n---\n---\n\ntwo", "\n---\none\n\nline\n---\ntwo"]
)
def test_parts_stand_between_lines_of_dashes(text: str) -> None:
    assert measuring.prompts_in(text) == generating.parts_of(text) == ["one\n\nline", "two"]


def test_a_line_of_dashes_is_no_prompt() -> None:
    assert measuring.prompts_in("---\none\ntwo") == ["one\ntwo"]
    assert measuring.prompts_in("one --- and\n\ntwo\n") == ["one --- and", "two"]


def test_dashes_alone_are_no_prompt() -> None:
    assert cli.main(["gen", "--batch", "parts", "--", "---"]) == 2


def test_what_the_encoding_of_a_terminal_lacks_is_escaped() -> None:
    code = "import miinb.commands as c, miinb.cli; c.overview = lambda prog: 'a \\u00e4'; miinb.cli.main(['-h'])"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("a \\xe4\n", "")
