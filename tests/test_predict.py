"""`predict` from end to end, in all its forms: the session's call, the magic, and the program."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import transformers
from IPython.core.interactiveshell import InteractiveShell

from miinb import Session
from miinb.errors import InvalidRequest, PromptTooLong
from tests.engine.test_baseline import save_bert

Program = Callable[..., str]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    folder = save_bert(transformers.BertForMaskedLM, tmp_path_factory.mktemp("bert"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
        with Session(folder, name="mask", device="cpu", options={"threads": 1}) as started:
            yield started


@pytest.fixture
def program(session: Session) -> Program:
    def said(*words: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "miinb", "predict", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout

    return said


def test_inputs_of_every_form(session: Session) -> None:
    texts = ["deep [MASK] is great", "[MASK] is"]
    both = session.predict(texts, top_k=2)
    assert [len(found) for found in both] == [2, 2]
    assert session.predict(tuple(texts), top_k=2) == both
    assert session.predict([{"query": text} for text in texts], top_k=2) == both
    assert session.predict(iter(texts), top_k=2) == both
    assert asyncio.run(session.apredict(texts, top_k=2)) == both
    (alone,) = session.predict(texts[0], top_k=2)
    assert [one.token for one in alone] == [one.token for one in both[0]]
    assert session.query({"query": texts[0]}).response[0]["token"] == alone[0].token


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        ([], InvalidRequest, "there are none"),
        (3, InvalidRequest, "int is no input of fill-mask"),
        (["a [MASK]", 3], InvalidRequest, "3 is no input of fill-mask"),
        ("no mask", InvalidRequest, "mask"),
        ("deep [MASK] " * 20, PromptTooLong, "42 tokens, but the model takes 32"),
    ],
)
def test_what_cannot_be_predicted_is_refused_in_words(
    session: Session, inputs: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        session.predict(inputs)
    assert session.predict("deep [MASK]")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 2**63}, "top_k: 9223372036854775808 is above 2147483647"),
        ({"top_k": 0}, "top_k: 0 is below 1"),
        ({"top_k": 2.5}, "top_k: 2.5 is not a whole number"),
        ({"top_k": 10**400}, "options: it holds"),
    ],
)
def test_wrong_options_are_refused_in_words(session: Session, options: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(words)):
        session.predict("deep [MASK]", **options)


def test_options_of_numpy_are_taken(session: Session) -> None:
    options = {"top_k": np.int64(2), "truncation": np.bool_(True), "targets": np.array(["deep", "is"])}
    assert len(session.predict("deep [MASK]", **options)[0]) == 2


def test_the_program_and_the_magic_show_the_same(session: Session, program: Program) -> None:
    def lines(text: str) -> list[str]:
        return text.rstrip().splitlines()[:-2]  # the last line tells times

    shown = lines(program("deep [MASK] is great", "--top-k", "2"))
    assert (shown[0], shown[1].split(), len(shown)) == ("deep [MASK] is great", ["TOKEN", "SCORE"], 4)
    assert lines(program("deep", "[MASK]", "is", "great", "-d", "mask", "--top-k", "2")) == shown
    listed = program('["deep [MASK]", "[MASK] is"]', "--top-k", "1", "--json").splitlines()
    assert [json.loads(line)["input"] for line in listed] == [0, 1]
    assert "no option 'pooling'" in program("deep [MASK]", "--pooling", "mean", code=1)
    assert "ask" in program("deep", code=1)
    assert "text is empty" in program(code=2)
    shell = InteractiveShell.instance()
    try:
        shell.run_line_magic("load_ext", "miinb")
        for found in (
            shell.run_line_magic("mii", "predict deep [MASK] is great --top-k 2"),
            shell.run_cell_magic("mii", "predict --top-k 2", "deep [MASK] is great\n"),
            shell.run_cell_magic("mii", "mask --top-k 2", "deep [MASK] is great\n"),
        ):
            assert lines(str(found)) == shown
    finally:
        InteractiveShell.clear_instance()
