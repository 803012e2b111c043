"""Holds the code to docs/api.md: its Python blocks and tables are read and compared with what is imported."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import miinb
from miinb import compat, errors
from miinb.config import BenchConfig, EngineOptions, GenerationParams
from miinb.image_params import ImageParams

TEXT = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
BLOCKS = [node for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) for node in ast.parse(block).body]
CLASSES = {node.name: node for node in BLOCKS if isinstance(node, ast.ClassDef)}
FUNCTIONS = {node.name: node for node in BLOCKS if isinstance(node, ast.FunctionDef)}
METHODS = {node.name: node for node in CLASSES["Session"].body if isinstance(node, ast.FunctionDef)}
#: Where the classes of the table "What comes back" live.
HOMES = {
    "Result": "results",
    "Runs": "bench.records",
    **dict.fromkeys(("ImageResult", "ImageTiming"), "image_results"),
    **dict.fromkeys(("Usage", "Timing", "Chunk"), "messages"),
    **dict.fromkeys(("Predictions", "PredictTiming", "Label", "Entity", "Answer", "Fill", "Embedding"), "predictions"),
}


def written(node: ast.FunctionDef) -> dict[str, Any]:
    """Parameter names with their kinds and defaults, as the document says."""
    arguments = node.args
    plain = [arg.arg for arg in arguments.args]
    found: dict[str, Any] = dict.fromkeys(plain, ("plain", inspect.Parameter.empty))
    for name, default in zip(plain[len(plain) - len(arguments.defaults) :], arguments.defaults, strict=True):
        found[name] = ("plain", value(default))
    for arg, keyword_default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found[arg.arg] = ("keyword", value(keyword_default) if keyword_default else inspect.Parameter.empty)
    if arguments.kwarg:
        found[arguments.kwarg.arg] = ("rest", inspect.Parameter.empty)
    return found


def value(node: ast.expr) -> Any:
    """A default: a literal, or `DeploymentType.LOCAL`."""
    if isinstance(node, ast.Attribute):
        return getattr(miinb.constants.DeploymentType, node.attr)
    return ast.literal_eval(node)


def real(function: Any) -> dict[str, Any]:
    """The same of a function."""
    kinds = {
        inspect.Parameter.POSITIONAL_OR_KEYWORD: "plain",
        inspect.Parameter.KEYWORD_ONLY: "keyword",
        inspect.Parameter.VAR_KEYWORD: "rest",
    }
    return {name: (kinds[p.kind], p.default) for name, p in inspect.signature(function).parameters.items()}


def column(title: str) -> list[tuple[str, list[str]]]:
    """Rows of the table whose header starts with `title`: first cell, and all code words of the row."""
    body = TEXT.split(f"| {title}", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [(row.split("|")[1].strip(), re.findall(r"`([^`]+)`", row)) for row in body]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_session_methods(name: str) -> None:
    assert real(getattr(miinb.Session, name)) == written(METHODS[name])


def test_session_has_no_public_method_that_the_contract_does_not_name() -> None:
    public = {name for name in vars(miinb.Session) if not name.startswith("_")}
    named = set(METHODS) | {word for _, words in column("property of Session") for word in words}
    assert named - {"__init__"} <= public
    undocumented = public - named
    assert undocumented <= {"instance_id", "load_s", "persist"}, undocumented


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_module_functions(name: str) -> None:
    assert real(getattr(miinb, name)) == written(FUNCTIONS[name])


@pytest.mark.parametrize("cls", [GenerationParams, ImageParams, EngineOptions, BenchConfig])
def test_fields_and_their_defaults(cls: type[GenerationParams | ImageParams | EngineOptions | BenchConfig]) -> None:
    named = {
        node.targets[0].id: value(node.value)
        for node in CLASSES[cls.__name__].body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert {name: field.default for name, field in cls.model_fields.items()} == named


@pytest.mark.parametrize("row", column("class"), ids=lambda row: row[0].strip("`"))
def test_what_comes_back(row: tuple[str, list[str]]) -> None:
    name, *attributes = row[1]
    cls = getattr(importlib.import_module(f"miinb.{HOMES[name]}"), name)
    known = set(dir(cls)) | set(inspect.signature(cls).parameters)
    made_in_init = {word for word in attributes if f"self.{word}" in inspect.getsource(cls)}
    assert set(attributes) <= known | made_in_init


def test_encoder_tasks_with_their_answers_and_options() -> None:
    from miinb.predictions import PREDICTIONS
    from miinb.tasks import TASKS

    named = {words[0]: (words[1], set(words[2:])) for _, words in column("task")}
    assert named == {name: (cls.__name__, set(TASKS[name].options)) for name, cls in PREDICTIONS.items()}


def test_what_runs_can_do() -> None:
    from miinb.bench import cost
    from miinb.bench.records import Runs
    from miinb.commands import keeping

    (text,) = (line for line in TEXT.splitlines() if line.startswith("* `Runs.cost("))
    (node,) = ast.parse(f"def {text.split('`')[1].removeprefix('Runs.')}: ...").body
    assert isinstance(node, ast.FunctionDef)
    plain = {name: value for name, value in real(Runs.cost).items() if name != "self"}
    assert plain == written(node)
    assert {name: value for name, value in real(cost.table).items() if name != "runs"} == plain
    actions = TEXT.split("`runs` does `", 1)[1].split("`", 1)[0].split()
    assert sorted(actions) == sorted(keeping.RUNS)


def test_mii_config_keys() -> None:
    rows = [words for _, words in column("`mii_config` key")]
    honored, special, accepted, refused = ([w for w in row if re.fullmatch(r"[a-z_]+", w)] for row in rows)
    assert set(honored) == set(compat.RENAMED)
    assert set(special) == set(compat.SPECIAL)
    assert set(accepted) == set(compat.ACCEPTED)
    assert set(refused) == set(compat.REFUSED)


def test_commands_are_those_of_the_table() -> None:
    from miinb.commands import COMMANDS

    line = next(line for line in TEXT.splitlines() if line.startswith("`start attach"))
    assert set(line.strip("`.").split()) == set(COMMANDS)


def test_settings_and_their_defaults() -> None:
    from miinb.commands.settings import Settings

    named = {name: ast.literal_eval(words[-1]) for _, words in column("setting") for name in words[:-1]}
    assert named == Settings().model_dump()


def test_charts() -> None:
    from miinb.bench import charts

    line = next(line for line in TEXT.splitlines() if line.startswith("`latency throughput"))
    for kind in line.split("`")[1].split():
        parameters = inspect.signature(getattr(charts, kind)).parameters
        assert next(iter(parameters)) == "frame"
        assert parameters["ax"].kind is inspect.Parameter.KEYWORD_ONLY


def test_errors_are_a_tree() -> None:
    tree = TEXT.split("```\nMiinbError\n", 1)[1].split("```", 1)[0]
    named = {"MiinbError"}
    for line in tree.splitlines():
        parent, _, children = line.strip().rpartition(": ")
        for child in children.split():
            assert getattr(errors, child).__bases__ == (getattr(errors, parent or "MiinbError"),)
            named.add(child)
        if parent:
            assert getattr(errors, parent).__bases__ == (errors.MiinbError,)
            named.add(parent)
    ours = {name for name, cls in errors.all_errors().items() if cls.__module__ == "miinb.errors"}
    assert named == ours


def test_every_public_name_is_there() -> None:
    for name in miinb.__all__:
        assert getattr(miinb, name) is not None


def test_panels_and_what_they_have() -> None:
    from miinb.notebook.panels import PANELS

    named = {words[0]: words[1:] for _, words in column("kind")}
    assert set(named) == set(PANELS)
    for kind, words in named.items():
        cls = PANELS[kind]
        for word in [*words, "pin", "snapshot", "stop", "wait", "close"]:
            name = word.removesuffix("()")
            assert hasattr(cls, name) or f"self.{name}" in inspect.getsource(cls), (kind, name)
