from __future__ import annotations

import atexit
import dataclasses
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from IPython.core.completer import CompletionContext, provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import Magics
from IPython.utils.capture import capture_output
from standin import StandIn
from traitlets import TraitError

import miinb
from miinb.bench.records import Runs
from miinb.commands import watching
from miinb.commands.settings import Settings
from miinb.errors import DeploymentNotFound, InvalidRequest, InvalidValue, MiinbError, UnknownOption
from miinb.messages import Status
from miinb.notebook.magics import MiiMagics, load_ipython_extension, unload_ipython_extension


class Shell(InteractiveShell):
    """A shell whose cells raise what they raise."""

    def run(self, cell: str) -> Any:
        done = self.run_cell(cell, store_history=False)
        done.raise_error()
        return done.result


@pytest.fixture
def deployments(monkeypatch: pytest.MonkeyPatch) -> dict[str, StandIn]:
    running = {"tiny": StandIn("tiny")}

    def attach(name: str) -> StandIn:
        if name not in running:
            raise DeploymentNotFound(f"No running deployment is called {name!r}.")
        return running[name]

    def found() -> list[Status]:
        return [one.status() for one in running.values() if one.state == "ready"]

    monkeypatch.setitem(vars(miinb), "deployments", found)
    monkeypatch.setitem(vars(miinb), "attach", attach)
    return running


@pytest.fixture
def shell(
    deployments: dict[str, StandIn], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shell]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))  # none of the user's own settings
    Shell.clear_instance()
    shell = Shell.instance()
    shell.history_manager.enabled = False
    load_ipython_extension(shell)
    yield shell
    unload_ipython_extension(shell)
    Shell.clear_instance()
    atexit.unregister(shell.atexit_operations)  # of a hundred shells they take minutes, each collecting garbage


def test_a_prompt_on_the_line_streams_and_gives_the_result(shell: Shell, deployments: dict[str, StandIn]) -> None:
    with capture_output() as shown:
        shell.run("r = %mii gen \"Hi, what's up?\" -n 4 --stop '\\n'")
    assert shown.stdout == "Once upon a time\n"
    assert shell.user_ns["r"].text == "Once upon a time"
    assert deployments["tiny"].calls == [("stream", "Hi, what's up?", {"max_new_tokens": 4, "stop": ["\n"]})]


@pytest.mark.parametrize("cell", ["%mii gen Hi", "%mii chat Hi", "%%mii gen\nHi"])
def test_a_deployment_that_generates_nothing_is_refused_before_anything_is_shown(
    shell: Shell, deployments: dict[str, StandIn], cell: str
) -> None:
    deployments["tiny"].task = "text-classification"
    with capture_output() as shown, pytest.raises(InvalidRequest, match="tiny serves text-classification"):
        shell.run(cell)
    assert "Once" not in shown.stdout
    assert not shown.outputs
    assert not deployments["tiny"].calls


def test_what_was_streamed_is_not_shown_twice_but_kept(shell: Shell) -> None:
    with capture_output() as shown:
        result = shell.run("%mii gen Hi")
    assert shown.stdout.startswith("Once upon a time\nOut[0]: 4 tokens · first token 35 ms")
    assert shown.stdout.count("Once upon") == 1
    assert result.text == "Once upon a time"
    with capture_output() as again:
        shell.user_ns["kept"] = result
        shell.run("kept")
    assert "4 tokens" in again.stdout


def test_cells_are_prompts_with_names_replaced(shell: Shell, deployments: dict[str, StandIn]) -> None:
    shell.user_ns["city"] = "Rome"
    with capture_output():
        shell.run('%%mii tiny -n 3 -o out\nSay {city} as {"json": {"city": 1}}\n  twice ;\n')
        shell.run("%%mii --raw\nSay {city}")
    assert deployments["tiny"].calls == [
        ("stream", 'Say Rome as {"json": {"city": 1}}\n  twice ;', {"max_new_tokens": 3}),
        ("stream", "Say {city}", {}),
    ]
    assert shell.user_ns["out"].text == "Once upon a time"


def test_names_are_replaced_in_every_option_before_it_is_read(shell: Shell, deployments: dict[str, StandIn]) -> None:
    shell.user_ns |= {"n": 5, "where": "tiny", "dashed": "--quiet", "variable": "kept"}
    with capture_output() as shown:
        shell.run('%mii gen {dashed} -n {n} -d {where} --logit-bias "{n}=-1" -o {variable}')
        shell.run("%%mii {where} --max-new-tokens={n}\nHi")
        with pytest.raises(InvalidValue, match=re.escape("'{n}' is not a whole number")):
            shell.run("%mii gen Hi -n {n} --raw")
    assert deployments["tiny"].calls == [
        ("stream", "--quiet", {"max_new_tokens": 5, "logit_bias": {5: -1.0}}),
        ("stream", "Hi", {"max_new_tokens": 5}),
    ]
    assert shell.user_ns["kept"].text in shown.stdout


def test_pictures_to_begin_from_are_files_or_variables(shell: Shell, deployments: dict[str, StandIn]) -> None:
    tiny = deployments["tiny"] = StandIn("tiny", task="text-to-image")
    photo, mask = object(), object()
    shell.user_ns.update(photo=photo, both=[photo, mask], paint={"mask": mask}, folder="/tmp")
    shell.run("%%mii -q --image {photo} --mask {paint[mask]} --strength 0.5\na {photo} of mine")
    shell.run("%%mii -q --image {both} --batch lines\na\nb")
    shell.run("%%mii -q --image {folder}/x.png --image y.png --batch lines\na\nb")
    shell.run("%mii gen -q a --image '{photo}' --raw")
    (_, prompt, first), *others = tiny.calls
    assert prompt.startswith("a <object")
    assert (first["image"], first["mask_image"], first["strength"]) == (photo, mask, 0.5)
    assert [call[2]["image"] for call in others] == [[photo, mask], ["/tmp/x.png", "y.png"], "{photo}"]


@pytest.mark.parametrize("flag", ["--image", "--mask", "--strength"])
def test_a_deployment_of_texts_takes_no_pictures(shell: Shell, flag: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{flag}: tiny serves text-generation, not pictures"):
        shell.run(f"%mii gen a {flag} 1")


def test_json_is_printed(shell: Shell) -> None:
    with capture_output() as shown:
        shell.run("s = %mii status --json")
        shell.run("%mii list --json -o found -q")
    assert json.loads(shown.stdout.partition("Out[")[0])["name"] == shell.user_ns["s"].name == "tiny"
    assert len(shell.user_ns["found"]) == 1


def test_show_prints_the_prompt_of_a_line_too(shell: Shell) -> None:
    shell.user_ns["city"] = "Rome"
    with capture_output() as shown:
        shell.run("r = %mii gen --show Say {city}")
    assert shown.stdout.startswith("Say Rome\nOnce upon a time\n")


def test_show_prints_the_final_prompt(shell: Shell) -> None:
    shell.user_ns["city"] = "Rome"
    with capture_output() as shown:
        shell.run("%%mii --show\nSay {city}")
    assert shown.stdout.startswith("Say Rome\nOnce upon a time\n")


@pytest.mark.parametrize("line", ["r = %mii gen Hi;", "r = %mii gen -q Hi"])
def test_quiet_shows_nothing(shell: Shell, line: str) -> None:
    with capture_output() as shown:
        shell.run(line)
    assert (shown.stdout, shown.stderr, shown.outputs) == ("", "", [])


def test_batches_keep_their_order(shell: Shell, deployments: dict[str, StandIn]) -> None:
    with capture_output():
        shell.run("%%mii gen --batch parts\none\nline\n---\ntwo")
        shell.run("%%mii gen --batch lines\none\n\ntwo")
    assert [prompts for _, prompts, _ in deployments["tiny"].calls] == [["one\nline", "two"], ["one", "two"]]


@pytest.mark.parametrize(
    ("cell", "error", "text"),
    [
        ("%mii strat x", InvalidValue, "Did you mean 'start'?"),
        ("%mii gen Hi --max-new-token 3", UnknownOption, "Did you mean '--max-new-tokens'?"),
        ("%mii gen Hi -n three", InvalidValue, "--max-new-tokens: 'three' is not a whole number"),
        ("%mii gen Hi -n 0", InvalidRequest, "max_new_tokens"),
        ("%mii gen Hi --temperature 0.5", InvalidRequest, "do_sample=True"),
        ("%mii gen What's up", InvalidValue, "A quote is not closed"),
        ("%mii gen", InvalidValue, "prompt is empty"),
        ("%mii gen Hi -d tinny", DeploymentNotFound, "tinny"),
        ("%mii gen Hi --show -o 1x", InvalidValue, "--output: '1x' cannot be a variable's name"),
        ("%mii gen Hi -o class", InvalidValue, "--output: 'class' is a word of Python itself"),
        ("%%mii gen -o a.b\nHi", InvalidValue, "--output: 'a.b' cannot be a variable's name"),
        ("%mii gen Hi -o ''", InvalidValue, "--output: '' cannot be a variable's name"),
        ("%%mii tinny\nHi", InvalidValue, "Did you mean 'tiny'?"),
        ("%%mii list\nHi", InvalidValue, "takes no cell"),
        ("%%mii gen Hi\nHi", InvalidValue, "on the line and in the cell"),
        ("%mii predict", InvalidValue, "the text is empty"),
        ("%mii check", InvalidValue, "which model"),
        ("%mii start", InvalidValue, "which model"),
        ("%%mii start\n{not json", InvalidValue, "not JSON"),
        ("%mii plot nosuch", InvalidValue, "latency"),
        ("%mii plot latency", InvalidValue, "no benchmark run yet"),
        ("%%mii start\nmodel = x", InvalidValue, "the cell is not TOML"),
        ("%mii start --config /no/such.toml", InvalidValue, "cannot be read"),
        ("%mii status --watch --json", InvalidValue, "--watch and --json"),
        ("%mii logs --grep (", InvalidValue, "no regular expression"),
        ("%mii logs --level warn", InvalidValue, "Did you mean 'warning'?"),
        ("%mii logs -n 0", InvalidValue, "less than 1"),
        ("%mii logs --follow soon", InvalidValue, "90s, 30m or 2h"),
        ("%mii stop tiny --all", InvalidValue, "--all"),
        ("%mii stop --force", InvalidValue, "takes a name"),
        ("%mii gen Hi --greedy --temperature 2", InvalidRequest, "do_sample=True"),
        ("%%mii gen --chat --batch lines\na\nb", InvalidValue, "--chat takes one text"),
        ("%%mii gen --stream --batch lines\na\nb", InvalidValue, "--stream"),
        ("%mii gen Hi --format html", InvalidValue, "--format: 'html'"),
        ("%mii env --jsn", UnknownOption, "Did you mean '--json'?"),
    ],
)
def test_errors_are_one_line_and_name_the_near_thing(shell: Shell, cell: str, error: type, text: str) -> None:
    with capture_output() as shown, pytest.raises(error, match=re.escape(text)):
        shell.run(cell)
    assert len((shown.stdout + shown.stderr).strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["1x", "class", "a.b", "''"])
def test_nothing_is_asked_whose_answer_could_not_be_kept(
    shell: Shell, deployments: dict[str, StandIn], name: str
) -> None:
    for cell in (f"%mii gen Hi --show -o {name}", f"%%mii --show -o {name}\nHi"):
        with capture_output() as shown, pytest.raises(InvalidValue, match="--output"):
            shell.run(cell)
        assert not deployments["tiny"].calls
        assert "--output" in shown.stdout + shown.stderr


def test_short_errors_can_be_turned_off(shell: Shell) -> None:
    with capture_output() as shown:
        shell.run("%config MiiMagics.short_errors = False")
        with pytest.raises(InvalidValue):
            shell.run("%mii strat")
        shell.run("%config MiiMagics.short_errors = True")
    assert "Traceback" in shown.stdout + shown.stderr


def test_settings_act_at_once(shell: Shell, deployments: dict[str, StandIn]) -> None:
    deployments["other"] = StandIn("other")
    with capture_output():
        shell.run("%config MiiMagics.max_new_tokens = 7")
        shell.run("%config MiiMagics.default_session = 'other'")
        shell.run("%mii gen Hi")
    assert deployments["other"].calls == [("stream", "Hi", {"max_new_tokens": 7})]


def test_several_deployments_ask_for_a_choice_until_one_is_used(shell: Shell, deployments: dict[str, StandIn]) -> None:
    deployments["other"] = StandIn("other")
    with capture_output(), pytest.raises(InvalidValue, match=r"other, tiny.*-d NAME"):
        shell.run("%mii gen Hi")
    with capture_output() as shown:
        shell.run("%mii use other")
        shell.run("%mii gen Hi")
        shell.run("%mii stop other")
        shell.run("%mii gen Hi")
    assert len(deployments["other"].calls) == len(deployments["tiny"].calls) == 1
    assert "Stopped other." in shown.stdout


def test_nothing_running_says_how_to_start(shell: Shell, deployments: dict[str, StandIn]) -> None:
    deployments.clear()
    with capture_output(), pytest.raises(DeploymentNotFound, match="%mii start MODEL"):
        shell.run("%mii gen Hi")


def test_the_same_start_finds_the_running_one(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    def session(**options: Any) -> StandIn:
        made.append(options)
        return StandIn(f"made-{len(made)}")

    monkeypatch.setitem(vars(miinb), "Session", session)
    shell.user_ns["folder"] = "/models/x"
    with capture_output():
        first = shell.run("%mii start {folder} --dtype fp32 --threads 2 --gpus '0,1;2,3'")
        again = shell.run("%mii start {folder} --dtype fp32 --threads 2 --gpus '0,1;2,3'")
        other = shell.run('%%mii start\n{"model": "/models/x", "dtype": "bf16"}')
        first.state = "lost"
        fresh = shell.run("%mii start {folder} --dtype fp32 --threads 2 --gpus '0,1;2,3'")
    assert again is first
    assert len({id(one) for one in (first, other, fresh)}) == 3
    assert made[0] == {"model": "/models/x", "dtype": "fp32", "gpus": [[0, 1], [2, 3]], "options": {"threads": 2}}
    assert made[1] == {"model": "/models/x", "dtype": "bf16"}


def test_chat_remembers_until_reset(shell: Shell, deployments: dict[str, StandIn]) -> None:
    with capture_output():
        for line in ("chat Hello --system 'Be short'", "chat More", "reset", "chat Anew"):
            shell.run(f"%mii {line}")
        shell.run("%%mii chat\nIn a cell")
    talks = [[turn["content"] for turn in messages] for _, messages, _ in deployments["tiny"].calls]
    answer = "Once upon a time"
    assert talks == [
        ["Be short", "Hello"],
        ["Be short", "Hello", answer, "More"],
        ["Anew"],
        ["Anew", answer, "In a cell"],
    ]


def test_a_chat_forgets_what_no_longer_fits(shell: Shell, deployments: dict[str, StandIn]) -> None:
    tiny = deployments["tiny"]
    with capture_output():
        shell.run("%mii chat One --system Brief -q")
        shell.run("%mii chat Two -q")
        tiny.dropped_messages = 2
        shell.run("%mii chat Three -q")
        tiny.dropped_messages = 0
        shell.run("%mii chat Four -q")
    talks = [[turn["content"] for turn in messages] for kind, messages, _ in tiny.calls if kind == "chat"]
    answer = "Once upon a time"
    assert talks[2] == ["Brief", "One", answer, "Two", answer, "Three"]
    assert talks[3] == ["Brief", "Two", answer, "Three", answer, "Four"]


def test_a_turn_that_fails_is_not_remembered(shell: Shell, deployments: dict[str, StandIn]) -> None:
    tiny = deployments["tiny"]
    with capture_output():
        shell.run("%mii chat One")
        with pytest.raises(InvalidRequest):
            shell.run("%mii chat Two --temperature 2")
        shell.run("%mii chat Three")
    answer = "Once upon a time"
    assert [turn["content"] for turn in tiny.calls[-1][1]] == ["One", answer, "Three"]


def test_several_answers_of_a_chat_do_not_mix(shell: Shell, deployments: dict[str, StandIn]) -> None:
    with capture_output() as shown:
        shell.run("r = %mii chat Hi --do-sample --num-return-sequences 2")
    assert deployments["tiny"].calls[0][0] == "chat"
    assert shown.outputs or shown.stdout


def test_tables_are_cards(shell: Shell) -> None:
    table = shell.run("%mii list -q")
    data, _ = shell.display_formatter.format(table)
    assert "<table" in data["text/html"]
    assert "tiny" in data["text/plain"]


def test_the_list_tells_gpus_and_owners(shell: Shell, deployments: dict[str, StandIn]) -> None:
    mine = subprocess.Popen(["sleep", "60"])
    other = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        pids = {"tiny": mine.pid, "theirs": int(other.stdout.readline()), "kept": 1 << 22, "gone": 1 << 22}
        for name in pids:
            deployments.setdefault(name, StandIn(name))
        deployments["kept"].persist, deployments["theirs"].gpu = True, 3
        found = [dataclasses.replace(deployments[name].status(), pid=pid) for name, pid in pids.items()]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(vars(miinb), "deployments", lambda: found)
            table = shell.run("%mii list -q")
        owners = ["this notebook", f"process {other.pid}", "persistent", "unknown"]
        assert [row[-1] for row in table.rows] == owners == [record["owner"] for record in table.records]
        assert [row[5] for row in table.rows] == ["cpu", "cpu 3", "cpu", "cpu"]
        assert "1 min 15 s" in str(table)
    finally:
        os.kill(pids["theirs"], signal.SIGKILL)
        for process in (mine, other):
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()


@pytest.mark.parametrize("line", ["%mii help", "%mii", "%mii help gen", "%mii gen --help", "%mii gen -h"])
def test_help(shell: Shell, line: str) -> None:
    with capture_output() as shown:
        shell.run(line)
    assert ("--max-new-tokens" if "gen" in line else "restart") in shown.stdout


def test_question_mark_shows_the_commands(shell: Shell) -> None:
    assert "bench" in shell.inspector.info(shell.find_line_magic("mii"))["docstring"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("%mii st", {"start", "status", "stop"}),
        ("%miinb lo", {"logs"}),
        ("x = %mii ge", {"gen"}),
        ("%mii gen -d ", {"tiny"}),
        ("%mii stop ti", {"tiny"}),
        ("%mii gen --max", {"--max-new-tokens"}),
        ("%mii start m --dtype b", {"bf16"}),
        ("%mii plot th", {"throughput"}),
        ("%mii help ben", {"bench"}),
        ("%mii panel ", {"text", "image", "encoder", "compare", "bench", "server"}),
        ("%mii panel se", {"server"}),
        ("%mii panel compare -d ", {"tiny"}),
        ("%%mii ti", {"tiny"}),
        ("%%mii tiny --seed 1 --top", {"--top-k", "--top-p"}),
        ("%%mii --out", {"--out", "--output"}),
    ],
)
def test_completion(shell: Shell, text: str, expected: set[str]) -> None:
    with provisionalcompleter():
        assert {found.text for found in shell.Completer.completions(text, len(text))} == expected


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("", "TextPanel"),
        ("text", "TextPanel"),
        ("compare", "ComparePanel"),
        ("bench", "BenchPanel"),
        ("server", "ServerCard"),
    ],
)
def test_panels_of_every_kind(shell: Shell, kind: str, name: str) -> None:
    with capture_output():
        shown = shell.run(f"%mii panel {kind}")
    assert type(shown).__name__ == name
    shown.close()


def test_panels_by_the_task_and_of_several_deployments(shell: Shell, deployments: dict[str, StandIn]) -> None:
    deployments["labels"] = StandIn("labels", task="text-classification")
    deployments["zebra"] = StandIn("zebra")
    deployments["drawn"] = StandIn("drawn", task="text-to-image")
    asked = ("-d labels", "encoder -d labels", "compare", "-d drawn", "image -d drawn", "compare -d drawn")
    with capture_output():
        found = [shell.run(f"%mii panel {words}") for words in asked]
    names = ["EncoderPanel", "EncoderPanel", "ComparePanel", "ImagePanel", "ImagePanel", "ImageComparePanel"]
    assert [type(one).__name__ for one in found] == names
    assert (found[2].first.value, found[2].second.value) == ("tiny", "zebra")
    for one in found:
        one.close()
    with pytest.raises(InvalidValue, match="'text' is not for text-classification"):
        shell.run("%mii panel text -d labels")
    with pytest.raises(InvalidValue, match="Did you mean 'compare'"):
        shell.run("%mii panel compar")


def test_an_option_is_offered_once_unless_it_may_be_repeated(shell: Shell) -> None:
    complete = shell.miinb_magics.complete
    assert complete("gen --max-new-tokens 3 --max", cell=False) == ([], "--max")
    assert complete("gen --stop a --sto", cell=False) == (["--stop"], "--sto")


@pytest.mark.parametrize("text", ["st", "x = mii st", "%%mii\nst", "%miix st", "%time st"])
def test_completion_stays_out_of_other_code(shell: Shell, text: str) -> None:
    lines = text.split("\n")
    context = CompletionContext("st", text, len(lines[-1]), len(lines) - 1, None)
    assert shell.miinb_magics.matcher(context) == {"completions": []}


def test_unload_takes_everything_away_and_reload_works(shell: Shell) -> None:
    matchers = len(shell.Completer.custom_matchers)
    load_ipython_extension(shell)
    assert len(shell.Completer.custom_matchers) == matchers
    unload_ipython_extension(shell)
    assert shell.find_line_magic("mii") is None
    assert shell.find_cell_magic("miinb") is None
    assert len(shell.Completer.custom_matchers) == matchers - 1
    assert not [one for one in shell.configurables if type(one).__name__ == "MiiMagics"]


@pytest.mark.parametrize("lines", [("%reload_ext miinb",), ("%unload_ext miinb", "%load_ext miinb")])
def test_chats_and_runs_outlive_a_reload(shell: Shell, deployments: dict[str, StandIn], lines: list[str]) -> None:
    deployments["other"] = StandIn("other")
    shell.run("%load_ext miinb")
    with capture_output():
        shell.run("%mii use other")
        shell.run("%mii chat One -q")
        shell.run("%config MiiMagics.max_new_tokens = 7")
    before = shell.miinb_magics
    run = Runs((), {})
    before.context.runs["first"] = run
    for line in lines:
        shell.run(line)
    assert shell.miinb_magics is not before
    assert shell.miinb_magics.context.run() is run
    with capture_output():
        shell.run("%mii chat Two -q")
    assert deployments["other"].calls[-2] == (
        "chat",
        [
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": "Once upon a time"},
            {"role": "user", "content": "Two"},
        ],
        {"max_new_tokens": 7},
    )
    assert not deployments["tiny"].calls


def test_a_load_that_fails_loses_no_chat(
    shell: Shell, deployments: dict[str, StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    shell.miinb_magics.context.default = "tiny"
    with monkeypatch.context() as patch:
        patch.setenv("MIINB_STREAM_HZ", "nonsense")
        with pytest.raises(MiinbError):
            load_ipython_extension(shell)
    load_ipython_extension(shell)
    assert shell.miinb_magics.context.default == "tiny"


def test_words_and_options_in_any_order(shell: Shell, deployments: dict[str, StandIn]) -> None:
    with capture_output():
        shell.run("%mii gen Once -n 4 upon --stop --- --presence-penalty -0.5 a time")
        shell.run("%mii gen -n 3 -- --quiet -- x")
    assert deployments["tiny"].calls == [
        ("stream", "Once upon a time", {"max_new_tokens": 4, "stop": ["---"], "presence_penalty": -0.5}),
        ("stream", "--quiet -- x", {"max_new_tokens": 3}),
    ]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []

    def session(**options: Any) -> StandIn:
        made.append(options)
        return StandIn(f"made-{len(made)}")

    monkeypatch.setitem(vars(miinb), "Session", session)
    return made


def test_a_start_from_toml_and_from_a_file(shell: Shell, made: list[dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "chat.toml"
    file.write_text('model = "from-file"\ndtype = "bf16"\nmax_batch = 4\n[options]\nthreads = 1\nmax_queue = 9\n')
    listed = tmp_path / "chat.json"
    listed.write_text('{"model": "from-json"}')
    shell.user_ns["file"] = file
    with capture_output():
        shell.run('%%mii start\n# a comment\nmodel = "m"\n[options]\nthreads = 2\n')
        shell.run('%%mii start --config {file} --threads 3 --idle-timeout-s 30m\ndtype = "fp32"')
        shell.run(f"%mii start --config {listed}")
    assert made[0] == {"model": "m", "options": {"threads": 2}}
    assert made[1] == {
        "model": "from-file",
        "dtype": "fp32",
        "max_batch": 4,
        "idle_timeout_s": 1800.0,
        "options": {"threads": 3, "max_queue": 9},
    }
    assert made[2] == {"model": "from-json"}
    with capture_output(), pytest.raises(InvalidValue, match="which model"):
        shell.run("%%mii start\n[options]\nthreads = 2\n")


def test_a_watch_ends_with_the_deployment_or_the_stop_button(
    shell: Shell, deployments: dict[str, StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            deployments["tiny"].state = "stopped"
        if len(waits) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(watching.time, "sleep", wait)
    with capture_output() as shown:
        last = shell.run("%mii status --watch")
        deployments["tiny"].state = "ready"
        shell.run("s = %mii status tiny --watch")
    assert waits == [1.0] * 4  # once a second at most
    assert last.state == "stopped"
    assert shell.user_ns["s"].state == "ready"
    assert shown.stdout.count("Deployment tiny (ready)") == 4
    assert shown.stdout.count("Deployment tiny (stopped)") == 1
    assert "Status(" not in shown.stdout


LOG = """==> frontend.log <==
2026-01-01 10:00:00,000 miinb.frontend INFO ready

==> rank-0-0.log <==
2026-01-01 10:00:00,000 miinb.worker INFO load 1/3
engine   optimized
2026-01-01 10:00:01,000 miinb.worker WARNING slow
  of the warning
2026-01-01 10:00:02,000 miinb.worker INFO ready
Fatal Python error: Segmentation fault"""


def test_help_quiet_and_names_that_are_commands(shell: Shell, deployments: dict[str, StandIn]) -> None:
    with capture_output() as shown:
        for words in ("", "help", "-h", "--help"):
            shell.run(f"%mii {words}")
    whole = shown.stdout
    assert whole[: len(whole) // 4] * 4 == whole
    with pytest.raises(InvalidValue, match="'list' is a command, and %%mii list would be that"):
        shell.run("%mii start folder --name list")


def test_a_killed_deployment_begins_anew(shell: Shell, deployments: dict[str, StandIn]) -> None:
    shell.run("%mii use tiny")
    shell.run("%mii status tiny")
    tiny = deployments.pop("tiny")
    tiny.state, began = "lost", []
    tiny.restart = lambda *, rolling: began.append("anew")  # type: ignore[method-assign]
    shell.run("%mii restart tiny")
    shell.run("%mii restart")
    assert began == ["anew", "anew"]


def test_logs_are_searched(shell: Shell, deployments: dict[str, StandIn]) -> None:
    deployments["tiny"].log = LOG

    def logs(options: str) -> list[str]:
        with capture_output() as shown:
            shell.run(f"%mii logs {options}")
        return shown.stdout.splitlines()

    assert logs("") == LOG.splitlines()
    warnings = [LOG.splitlines()[i] for i in (3, 6, 7, 9)]
    assert logs("--level warning") == warnings
    assert logs("--level warning -n 1") == [warnings[0], warnings[-1]]
    assert logs("--grep read[xy]") == [LOG.splitlines()[i] for i in (0, 1, 3, 8)]
    assert logs("--level error --grep ready") == ["No line of the last 100,000 of a log matches."]


def test_logs_are_followed(shell: Shell, deployments: dict[str, StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = deployments["tiny"]
    tiny.log = LOG
    new = iter(["\n2026-01-01 10:00:03,000 miinb.worker INFO one", "\nsecond line", "\nlast"])

    def wait(seconds: float) -> None:
        text = next(new)
        tiny.log += text
        if text == "\nlast":
            tiny.state = "stopped"

    monkeypatch.setattr(watching.time, "sleep", wait)
    with capture_output() as shown:
        shell.run("%mii logs -n 1 --follow 1m -o kept")
    lines = [LOG.splitlines()[i] for i in (0, 1, 3, 9)] + ["2026-01-01 10:00:03,000 miinb.worker INFO one"]
    assert shown.stdout.splitlines() == [*lines, "second line", "last"]
    assert shell.user_ns["kept"] == shown.stdout.removesuffix("\n")


def test_stop_waits_for_requests_when_asked_and_tells_of_the_memory(
    shell: Shell, deployments: dict[str, StandIn]
) -> None:
    deployments["tiny"].gpu = 0
    with capture_output() as shown:
        shell.run("%mii stop tiny --grace 1m")
    assert deployments["tiny"].calls == [("stop", None, {"drain_s": 60.0})]
    assert shown.stdout == "Stopped tiny. 1.61 GB of GPU memory are free again.\n"


def test_all_are_stopped_that_can_be(shell: Shell, deployments: dict[str, StandIn]) -> None:
    deployments["other"] = StandIn("other")

    def refuse(**limits: float) -> None:
        raise MiinbError("Something is left.")

    deployments["other"].stop = refuse  # type: ignore[method-assign]
    with (
        capture_output() as shown,
        pytest.raises(MiinbError, match=r"other: Something is left\. %mii stop --all --force"),
    ):
        shell.run("%mii stop --all")
    assert "Stopped tiny." in shown.stdout
    assert deployments["tiny"].state == "stopped"


def test_one_answer_through_the_chat_template(shell: Shell, deployments: dict[str, StandIn]) -> None:
    with capture_output():
        shell.run("%mii gen --chat Hi --greedy --timeout-s 2m")
        shell.run("%mii gen --system Brief Hi --no-stream")
        shell.run("%mii chat Hi --no-stream")
    user = {"role": "user", "content": "Hi"}
    stream, chat, _, turn, _ = deployments["tiny"].calls
    assert stream == ("stream", [user], {"do_sample": False, "timeout_s": 120.0})
    assert chat == ("chat", [{"role": "system", "content": "Brief"}, user], {})
    assert turn[:2] == ("chat", [user])  # gen leaves no conversation behind


def test_answers_as_json(shell: Shell, deployments: dict[str, StandIn]) -> None:
    with capture_output() as shown:
        shell.run("r = %mii gen Hi --format json")
    told = json.loads(shown.stdout)
    assert told["texts"] == ["Once upon a time"]
    assert told["usage"]["output_tokens"] == 4
    assert shell.user_ns["r"].text == "Once upon a time"


def test_markdown_is_asked_for_and_cannot_act(shell: Shell, deployments: dict[str, StandIn]) -> None:
    deployments["tiny"].words = ["**bold** ", "<img src=x onerror=alert(1)>"]
    screen = shell.miinb_magics.context.screen
    screen._live = True
    html = []
    for cell in ("%mii gen Hi --format markdown", "%mii gen Hi --format markdown --no-stream", "%mii gen Hi"):
        with capture_output() as shown:
            shell.run(cell)
        html.append("".join(output.data.get("text/html", "") for output in shown.outputs))
    assert "<b>bold</b>" in html[0]
    assert "<b>bold</b>" in html[1]
    assert "**bold**" in html[2]
    assert all("<img" not in text for text in html)
    with capture_output() as shown:
        shell.run("%config MiiMagics.render_markdown = True")
        shell.run("%mii gen Hi")
        shell.run("%mii gen Hi --no-stream --format text")
    html = [output.data.get("text/html", "") for output in shown.outputs]
    assert any("<b>bold</b>" in text for text in html)
    assert "**bold**" in html[-1]


def test_config_tells_where_each_setting_comes_from(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.miinb]\nmax_new_tokens = 5\nstream_hz = 5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIINB_STREAM_HZ", "7")
    load_ipython_extension(shell)
    with capture_output():
        shell.run("%config MiiMagics.short_errors = False")
        shell.run("c = %mii config")
        shell.run("%config MiiMagics.short_errors = True")
    rows = {row[0]: row[1:3] for row in shell.user_ns["c"].rows}
    assert rows["max_new_tokens"] == (5, f"{tmp_path / 'pyproject.toml'} [tool.miinb]")
    assert rows["stream_hz"] == (7.0, "environment MIINB_STREAM_HZ")
    assert rows["short_errors"] == (False, "%config MiiMagics")
    assert rows["default_session"] == ("", "package")
    assert shell.miinb_magics.max_new_tokens == 5  # %config shows it too


def test_a_wrong_setting_refuses_the_extension(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    unload_ipython_extension(shell)
    monkeypatch.setenv("MIINB_MAX_NEW_TOKENS", "many")
    with pytest.raises(InvalidValue, match=r"environment MIINB_MAX_NEW_TOKENS: 'many' is not a whole number"):
        load_ipython_extension(shell)
    assert shell.find_line_magic("mii") is None


def test_what_config_has_refused_does_not_keep_the_extension_away(shell: Shell) -> None:
    with capture_output():
        shell.run("%config MiiMagics.max_new_tokens = 7")
        shell.run("%config MiiMagics.stream_hz = 'abc'")
    with capture_output() as shown:
        load_ipython_extension(shell)
    assert shown.stderr == "%config MiiMagics.stream_hz: 'abc' is not possible and was ignored.\n"
    assert shell.find_line_magic("mii") is not None
    assert shell.miinb_magics.stream_hz == 10.0
    assert shell.miinb_magics.max_new_tokens == 7
    with capture_output() as shown:
        load_ipython_extension(shell)
    assert not shown.stderr


def test_settings_are_the_traits(shell: Shell) -> None:
    magics, traits = shell.miinb_magics, MiiMagics.class_traits(config=True)
    assert set(traits) - set(Settings.model_fields) <= set(Magics.class_traits(config=True))
    for name, field in Settings.model_fields.items():
        assert (traits[name].default_value, traits[name].help) == (field.default, field.description)
        for bad in (-1, 51):
            refused = []
            for set_it in (lambda: Settings.parse({name: bad}), lambda: setattr(magics, name, bad)):  # noqa: B023
                try:
                    set_it()
                except (InvalidValue, TraitError):
                    refused.append(set_it)
            assert len(refused) in (0, 2), (name, bad)


def test_unload_leaves_deployments_alone(shell: Shell, deployments: dict[str, StandIn]) -> None:
    load_ipython_extension(shell)
    unload_ipython_extension(shell)
    assert deployments["tiny"].state == "ready"
