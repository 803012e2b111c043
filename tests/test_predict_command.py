"""`predict` as a command: where its inputs come from, its options, and what it prints."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from miinb import commands
from miinb.client import Client
from miinb.commands.options import PREDICTION
from miinb.errors import InvalidRequest, InvalidValue, MiinbError
from miinb.tasks import TASKS
from tests.predict_server import PredictServer


class Deployment:
    """A session of the stand-in server; `inputs` and `options` are the last ones."""

    state = "ready"

    def __init__(self, server: PredictServer) -> None:
        self.client = Client(server.address)

    def predict(self, inputs: Any, **options: Any) -> Any:
        self.inputs, self.options = inputs, options
        return self.client.predict(inputs, **options)


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    server = PredictServer()
    deployment = Deployment(server)
    yield deployment
    deployment.client.close()
    server.close()


def run(deployment: Deployment, *words: str, body: str | None = None, prog: str = "miinb") -> Any:
    command = commands.find("predict")
    context = commands.Context(prog=prog, sessions={"d": deployment})  # type: ignore[dict-item]
    values = commands.parse(command, [*words, "-d", "d"], prog=prog)
    return commands.execute(context, command, values, body)


QUESTION, CONTEXT = "Who?", "Ada did."
PAIR = {"question": QUESTION, "context": CONTEXT}


@pytest.mark.parametrize(
    ("words", "body", "inputs"),
    [
        (["deep", "[MASK]"], None, "deep [MASK]"),
        (["[MASK] is a city"], None, "[MASK] is a city"),
        ([], "a text\nof two lines\n", "a text\nof two lines"),
        (["--batch", "lines"], "one\n\ntwo\n", ["one", "two"]),
        (["--batch", "parts"], "one\n---\ntwo\nthree\n", ["one", "two\nthree"]),
        (['["one", "two"]'], None, ["one", "two"]),
        ([], '{"query": "one"}', {"query": "one"}),
    ],
)
def test_texts_of_the_line_and_the_cell(
    deployment: Deployment, words: list[str], body: str | None, inputs: Any
) -> None:
    run(deployment, *words, body=body)
    assert deployment.inputs == inputs


@pytest.mark.parametrize(
    ("words", "body", "inputs"),
    [
        ([QUESTION, "--context", CONTEXT], None, PAIR),
        (["--question", QUESTION, "--context", CONTEXT], None, PAIR),
        (["--question", QUESTION], CONTEXT + "\n", PAIR),
        (["--context", CONTEXT, "--batch", "lines"], "Who?\nWhat?", [PAIR, {**PAIR, "question": "What?"}]),
        ([QUESTION, "--context", "-"], None, PAIR),
        (["--question", QUESTION, "-"], None, PAIR),
    ],
)
def test_questions_and_contexts(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, words: list[str], body: str | None, inputs: Any
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(CONTEXT))
    with pytest.raises(InvalidRequest, match="no input 'question'"):  # the server classifies
        run(deployment, *words, body=body)
    assert deployment.inputs == inputs


def test_files_and_the_standard_input(deployment: Deployment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text('one\n\n{"query": "two"}\n[MASK] is\n{no JSON\n')
    wanted = ["one", {"query": "two"}, "[MASK] is", "{no JSON"]
    run(deployment, "--file", str(file))
    assert deployment.inputs == wanted
    monkeypatch.setattr("sys.stdin", io.StringIO("three\nfour\n"))
    run(deployment, "--file", str(file), "--file", "-")
    assert deployment.inputs == [*wanted, "three", "four"]
    monkeypatch.setattr("sys.stdin", io.StringIO("five\n"))
    run(deployment, "-")
    assert deployment.inputs == "five"


@pytest.mark.parametrize(
    ("words", "body", "says"),
    [
        ([], None, "the text is empty"),
        ([], " \n", "the text is empty"),
        (["a"], "b", "texts on a line and in a cell"),
        (["a", "--file", "b"], None, "texts on a line and in files"),
        (["--file", "/no/such"], None, "/no/such cannot be read: No such file"),
        (["--file", "/dev/null"], None, "/dev/null has no text"),
        (["-"], None, "the standard input has no text"),
        (["a", "--question", "b", "--context", "c"], None, "a question, a context and a text"),
        (["--question", "b"], None, "the context is missing"),
        (["--context", "b"], None, "the question is missing"),
        (["--contxt", "b"], None, "Did you mean '--context'?"),
        (["a", "--pooling", "max"], None, "'max' is none of mean, first, none"),
        (["a", "--top-k", "many"], None, "'many' is not a whole number"),
    ],
)
def test_wrong_ways_are_refused_in_words(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, words: list[str], body: str | None, says: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(MiinbError) as caught:
        run(deployment, *words, body=body)
    assert says in caught.value.line()


def test_a_notebook_has_no_standard_input(deployment: Deployment) -> None:
    for words in (["-"], ["a", "--context", "-"]):
        with pytest.raises(InvalidValue, match="no standard input"):
            run(deployment, *words, prog="%mii")


def test_options_have_the_types_of_their_tasks(deployment: Deployment) -> None:
    words = ["a", "--top-k", "2", "--targets", "x,y", "--no-align-to-words", "--truncation", "--timeout-s", "9"]
    run(deployment, *words)
    wanted = {"top_k": 2, "targets": ["x", "y"], "align_to_words": False, "truncation": True, "timeout_s": 9.0}
    assert deployment.options == wanted


def test_the_command_has_every_option_of_every_task() -> None:
    known = {name for task in TASKS.values() for name in task.options}
    assert {option.target for option in PREDICTION} == known | {"timeout_s"}
    assert "(token-classification)" in commands.help_text("miinb", "predict")


def test_json_is_a_line_for_each_input(deployment: Deployment) -> None:
    lines = commands.as_json(run(deployment, '["a", "bb"]')).splitlines()
    assert [json.loads(line) for line in lines] == [
        {"input": 0, "predictions": [{"label": "length", "score": 1.0}]},
        {"input": 1, "predictions": [{"label": "length", "score": 2.0}]},
    ]


def test_json_of_vectors() -> None:
    server = PredictServer("feature-extraction")
    deployment = Deployment(server)
    try:
        (line,) = commands.as_json(run(deployment, "abc")).splitlines()
        assert json.loads(line)["predictions"][0]["embedding"][:2] == [3.0, 0.0]
    finally:
        deployment.client.close()
        server.close()
