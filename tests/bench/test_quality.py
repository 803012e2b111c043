"""Quality against speed: what is checked before anything starts, what an arm's process finds, how arms are compared."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from miinb import models
from miinb.bench import quality
from miinb.bench.charts import draw, fitting
from miinb.bench.headline.suites import Workload
from miinb.bench.quality import __main__ as command
from miinb.bench.quality import engine_side, measuring, planning
from miinb.bench.quality.jobs import SUITE, Job, Reading
from miinb.bench.quality.texts import Text, licenses, read
from miinb.bench.records import Runs, load_runs
from miinb.config import DeploymentConfig
from miinb.demo import tiny_encoder, tiny_model
from miinb.engine import calibrate
from miinb.errors import InvalidValue, MiinbError, ModelError, OutOfMemory, UnsupportedModel

STORY = "Once upon a time, there was a brave cat. " * 40
DECODE = Workload(SUITE, ((6, 4),), repeats=2)
SMALL: dict[str, Any] = {"prompt_tokens": 6, "new_tokens": 4, "repeats": 2, "text_tokens": 300, "window": 64}


def reading(text: str = STORY, *, window: int = 64, most: int = 300, folder: Path | None = None) -> Reading:
    return planning.read_windows(models.inspect(folder or tiny_model()), Text("a story", text), most, window, DECODE)


def jobs(arms: Any, found: Reading | None = None, **options: Any) -> list[Job]:
    found = found or reading()
    same = {"model": str(tiny_model()), "task": "text-generation", "device": "cpu"}
    return planning.plan_jobs(arms, found, models.inspect(tiny_model()), same, options)


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was about to start")

    monkeypatch.setattr(measuring, "Worker", refuse)


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no arms": ([], {}, "give dtypes"),
    "a word": ("int8", {}, "give dtypes"),
    "twice": (["auto", "auto"], {}, "'auto' is there twice"),
    "the same": (["auto", "bf16"], {}, "'auto' and 'bf16' are the same here, bf16"),
    "unknown dtype": (["auto", "int9"], {}, "int8"),
    "all quantized": (["int8", "int4"], {}, "one must be unquantized"),
    "an fp8 cache is lossy": ({"a": {"kv_dtype": "fp8"}}, {}, "one must be unquantized"),
    "nameless": ({" ": {}}, {}, "needs a name"),
    "no mapping": ({"a": "int8"}, {}, "'a' needs a mapping"),
    "unknown field": ({"a": {"dtpe": "int8"}}, {}, "cannot set 'dtpe'"),
    "unknown option": (["auto"], {"options": {"calibrate": "off"}}, "calibrat"),
    "options": (["auto"], {"options": ["off"]}, "no mapping"),
    "no text": (["auto"], {"text": [" "]}, "text: there is none"),
    "one token": (["auto"], {"text": ["."]}, "too few"),
    "no file": (["auto"], {"text": "/nowhere/text"}, "/nowhere/text cannot be read"),
    "no words": (["auto"], {"text": [5]}, "int is no text"),
    "one new token": (["auto"], {"new_tokens": 1}, "new_tokens: 1"),
    "a window of none": (["auto"], {"window": 0}, "window: 0"),
    "half a token": (["auto"], {"text_tokens": 2.5}, "text_tokens: 2.5"),
    "too long": (["auto"], {"prompt_tokens": 500, "new_tokens": 100}, "do not fit the context"),
    "no time": (["auto"], {"limit_s": 0}, "limit_s: 0"),
    "offloaded": ({"a": {"options": {"offload": "cpu"}}}, {}, "plain transformers would serve 'a'"),
    "no room": (["auto"], {"options": {"memory_limit_bytes": 1 << 20}}, "needs about"),
    "no such device": (["auto"], {"device": "gpu"}, "device"),
}


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_before_a_process_starts(name: str) -> None:
    arms, fields, match = WRONG[name]
    kinds = OutOfMemory if name == "no room" else UnsupportedModel if name == "offloaded" else MiinbError
    with pytest.raises(kinds) as failure:
        quality.measure(tiny_model(), arms, **{"text": [STORY], **fields})
    assert match in failure.value.line()


@pytest.mark.usefixtures("nothing_starts")
def test_models_that_it_cannot_read_with_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        quality.measure(tiny_encoder("fill-mask"), ["auto"])
    folder = shutil.copytree(tiny_model(), tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        quality.measure(folder, ["auto"])


def test_the_text_is_all_read_once_and_each_window_begins_as_the_tokenizer_has_it(tmp_path: Path) -> None:
    plain = reading(window=16, most=50)
    assert [len(window) for window in plain.windows] == [16, 16, 16, 2]
    assert plain.first == 1
    assert plain.about()["text_tokens"] == 46
    folder = shutil.copytree(tiny_model(), tmp_path / "m")
    values = json.loads((folder / "tokenizer.json").read_text())
    special = values["added_tokens"][0]
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": special["content"], "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            special["content"]: {
                "id": special["content"],
                "ids": [special["id"]],
                "tokens": [special["content"]],
            }
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(values))
    begun = reading(window=16, most=50, folder=folder)
    assert {window[0] for window in begun.windows} == {special["id"]}
    assert [token for window in begun.windows for token in window[1:]] == [
        token for window in plain.windows for token in window
    ]
    assert begun.about()["text_tokens"] == 50
    assert max(map(len, begun.windows)) == 16


def test_the_reference_goes_first_and_each_arm_has_its_options() -> None:
    found = jobs({"small": {"dtype": "int8"}, "plain": {}, "other": {"options": {"calibration": "off"}}}, threads=1)
    assert [job.arm.label for job in found] == ["plain", "small", "other"]
    assert [job.dtype for job in found] == ["bf16", "int8", "bf16"]
    assert [job.config.options.calibration for job in found] == ["auto", "auto", "off"]
    assert {job.config.options.threads for job in found} == {1}
    assert [job.arm.label for job in jobs(["int8", "auto"])] == ["bf16", "int8"]


def truth(found: Reading) -> tuple[list[float], list[int]]:
    """Losses and likeliest tokens by plain transformers in fp32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    losses, likeliest = [], []
    with torch.no_grad():
        for window in found.windows:
            ids = torch.tensor([window])
            logits = model(ids).logits[0, found.first - 1 : -1]
            losses += torch.nn.functional.cross_entropy(logits, ids[0, found.first :], reduction="none").tolist()
            likeliest += logits.argmax(-1).tolist()
    return losses, likeliest


def test_an_arm_reads_as_transformers_do_and_is_timed() -> None:
    found = reading()
    (measured,) = engine_side.run_job(jobs(["fp32"], found, threads=1)[0], None)
    losses, likeliest = truth(found)
    assert not measured.error
    assert measured.facts["losses"] == pytest.approx(losses, rel=1e-4, abs=1e-5)
    assert measured.facts["likeliest"] == likeliest
    assert measured.facts["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert measured.facts["weights_bytes"] > 4 * 500_000
    rows = [row for row in measured.records if not row["warmup"]]
    assert {(row["output_tokens"], row["arm"], row["batch_size"]) for row in rows} == {(4, "fp32", 1)}


def test_what_is_no_number_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((3,), math.nan), torch.zeros(3)

    monkeypatch.setattr(engine_side, "token_losses", broken)
    (measured,) = engine_side.run_job(jobs(["fp32"], threads=1)[0], None)
    assert "likelihood of 0" in measured.error


def test_arms_are_compared_token_by_token() -> None:
    plain = {"perplexity": 3.0, "losses": [1.0, 2.0, 3.0, 0.5], "likeliest": [1, 2, 3, 4]}
    other = {"perplexity": 4.0, "losses": [1.1, 2.3, 3.0, 0.6], "likeliest": [1, 2, 3, 5], "load_s": 2.0}
    found = measuring.compared(other, plain)
    assert found["perplexity_change"] == pytest.approx(math.exp((0.1 + 0.3 + 0.0 + 0.1) / 4) - 1)
    assert found["perplexity_change_lo"] < found["perplexity_change"] < found["perplexity_change_hi"]
    assert found["same_next"] == 0.75
    assert found["load_s"] == 2.0
    assert not {"losses", "likeliest"} & set(found)
    itself = measuring.compared(plain, plain)
    assert [itself[f"perplexity_change{end}"] for end in ("", "_lo", "_hi")] == [0, 0, 0]
    assert "perplexity_change" not in measuring.compared(other, {})


def test_a_text_is_a_file_a_list_or_licenses_that_int4_is_not_fitted_to(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("Some words.", encoding="utf-8-sig")
    assert read(tmp_path / "own.txt") == read(str(tmp_path / "own.txt")) == Text("own.txt", "Some words.")
    assert read(["a", "b"]) == Text("2 given texts", "a\n\nb")
    found = licenses()
    assert read(None) == found
    assert len(found.text) > 10_000
    assert "Apache License" in found.text
    fitted = calibrate.calibration_text("auto")
    assert not {line for line in found.text.splitlines() if len(line) > 40} & set(fitted.splitlines())
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InvalidValue, match=r"bytes\.txt cannot be read"):
        read(tmp_path / "bytes.txt")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Runs, Path, list[str]]:
    """Three arms of the tiny model in processes of their own, of which one fails while it loads."""
    out, said = tmp_path_factory.mktemp("runs"), list[str]()
    gone = out / "gone.txt"
    gone.write_text(STORY)

    def say(words: str) -> None:
        said.append(words)
        gone.unlink(missing_ok=True)  # after the first arm: what int4 is fitted to is no longer there

    arms = {
        "small": {"dtype": "int8"},
        "plain": {"dtype": "fp32"},
        "lost": {"dtype": "int4", "options": {"calibration": str(gone)}},
    }
    runs = quality.measure(tiny_model(), arms, [STORY], options={"threads": 1}, out=out, say=say, **SMALL)
    return runs, out, said


def test_a_run_has_costs_and_gains_of_each_arm_and_what_failed(measured: tuple[Runs, Path, list[str]]) -> None:
    runs, out, said = measured
    table = quality.table(runs)
    assert list(table["arm"]) == ["plain", "small", "lost"]
    plain, small, lost = (row for _, row in table.iterrows())
    losses, _ = truth(reading())
    assert plain["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (plain["change"], plain["faster"], plain["of_bytes"], plain["same_next"]) == (0, 1, 1, 1)
    assert small["change"] == pytest.approx(small["perplexity"] / plain["perplexity"] - 1, rel=1e-3, abs=1e-6)
    assert abs(small["change"]) < 0.1
    assert small["change_lo"] <= small["change"] <= small["change_hi"]
    assert small["of_bytes"] == pytest.approx(1.0625 / 4, rel=0.05)
    assert 0.8 < small["same_next"] <= 1
    assert small["tok_s"] > 0
    assert math.isnan(lost["change"])
    (env,) = runs.env.values()
    assert "gone.txt cannot be read" in env["arms"]["lost"]["error"]
    assert len(said) == 3
    assert "failed" in said[-1]
    assert not {"losses", "likeliest"} & set(env["arms"]["small"])
    again = load_runs(out)
    assert quality.table(again)["perplexity"].tolist()[:2] == table["perplexity"].tolist()[:2]
    assert f"({small['change']:+.2%})" in repr(again)


def test_a_real_run_is_drawn(measured: tuple[Runs, Path, list[str]]) -> None:
    runs, *_ = measured
    assert fitting(runs) == "quality"
    text = " ".join(part.get_text() for part in draw("quality", runs).texts)
    assert "Perplexity of 1 given text, 2" in text
    assert "lost" in text


def test_the_command_measures_stores_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.txt").write_text(STORY)
    what = [str(tiny_model()), "--dtypes", "auto", "int8", "--text", str(tmp_path / "own.txt"), "--device", "cpu"]
    sizes = ["--text-tokens", "100", "--window", "32", "--prompt-tokens", "4", "--new-tokens", "3", "--repeats", "2"]
    kept = ["--out", str(tmp_path / "runs"), "--chart", str(tmp_path / "chart.png")]
    assert command.main([*what, *sizes, *kept]) == 0
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert list(load_runs(tmp_path / "runs").summary["arm"]) == ["bf16", "int8"]
    assert "same_next" in capsys.readouterr().out
    assert command.main([str(tiny_model()), "--dtypes", "int8"]) == 1
    assert "InvalidValue: arms: one must be unquantized" in capsys.readouterr().err


def test_a_job_is_what_the_planner_resolved() -> None:
    (job,) = jobs(["auto"])
    assert isinstance(job.config, DeploymentConfig)
    assert (job.device, job.dtype, job.config.max_batch, job.config.max_length) == ("cpu", "bf16", 1, 64)


def test_options_of_all_arms_are_left_out_where_they_do_not_act() -> None:
    found = jobs(["auto", "int8", "int4"], calibration=["Some text."], quantize_head=False)
    assert [job.dtype for job in found] == ["bf16", "int8", "int4"]
    assert [job.config.options.calibration for job in found] == ["auto", "auto", ["Some text."]]
    assert [job.config.options.quantize_head for job in found] == [True, False, False]
