"""The frontend tokenizes with the exported files as AutoTokenizer does with the model's folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from miinb.demo import tiny_model
from miinb.engine import tokenizer_cache
from miinb.engine.tokenizer_files import export_tokenizer
from miinb.errors import BrokenCheckpoint
from miinb.server.text import TextCodec
from tests.tiny_tokenizers import TEXT, byte_level, sentence_piece


def model(folder: Path, **config: Any) -> Any:
    """What `export_tokenizer` reads of a ModelInfo."""
    return SimpleNamespace(
        format="safetensors",
        folder=folder,
        source=folder,
        files=(),
        vocab_size=500,
        config={"model_type": "llama"} | config,
    )


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", None])
@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_exported_files_tokenize_as_transformers(tmp_path: Path, make: Any, tokenizer_class: str | None) -> None:
    from transformers import AutoTokenizer

    folder = make(tmp_path / "model")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["tokenizer_class"] = tokenizer_class
    if tokenizer_class is None:  # then the model's type decides
        del config["tokenizer_class"]
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    file.write_text(json.dumps(config))
    info = model(folder)
    export_tokenizer(info, tmp_path / "exported")
    codec, reference = TextCodec.load(tmp_path / "exported"), AutoTokenizer.from_pretrained(folder)
    told = json.loads((tmp_path / "exported" / "tokenizer_config.json").read_text())
    types = "token_type_ids" in told.get("model_input_names", ())
    assert types == ("token_type_ids" in reference.model_input_names)
    for text in (*TEXT[:3], "Hello  world", " leading"):
        assert codec.encode(text) == reference(text).input_ids
    if reference.chat_template:
        chat = [{"role": "user", "content": "Hi"}]
        rendered = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert codec.render_chat(chat) == rendered


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))


def without_added(folder: Path, *tokens: str) -> None:
    """Take tokens from those of tokenizer.json that are special; they stay in its vocabulary."""
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    edit(folder / "tokenizer.json", added_tokens=[token for token in added if token["content"] not in tokens])


def flags(content: str, **changes: bool) -> dict[str, Any]:
    names = ("lstrip", "rstrip", "single_word", "normalized")
    return {"content": content, "special": True} | dict.fromkeys(names, False) | changes


def named_in_the_configuration_alone(folder: Path) -> None:
    without_added(folder, "<s>", "</s>")


def not_special_in_the_file(folder: Path) -> None:
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    edit(folder / "tokenizer.json", added_tokens=[token | {"special": False} for token in added])


def more_tokens(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", additional_special_tokens=["<|tool|>", "<|user|>"])


def extra_tokens(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", extra_special_tokens=[flags("<|tool|>") | {"__type": "AddedToken"}])


def extra_named_tokens(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", extra_special_tokens={"tool_token": "<|tool|>"})


def another_named_token(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", tool_token="<|tool|>")


def split_special_tokens(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", split_special_tokens=True)


def other_flags(folder: Path) -> None:
    decoder = {"0": flags("<s>", rstrip=True), "1": flags("</s>", special=False), "2": flags("<|user|>", lstrip=True)}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=decoder)


def tokens_of_old_folders(folder: Path) -> None:
    edit(folder / "special_tokens_map.json", additional_special_tokens=["<|old|>"], pad_token=flags("<pad>"))
    edit(folder / "added_tokens.json", **{"<|tool|>": 400, "<|old|>": 401, "<pad>": 402})


def begins_and_ends(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", add_bos_token=True, add_eos_token=True, add_prefix_space=True)


def pads(folder: Path) -> None:
    padding = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 399}
    edit(folder / "tokenizer.json", padding=padding | {"pad_type_id": 0, "pad_token": "<|tool|>"})


def class_of_the_family(folder: Path) -> None:
    edit(folder / "config.json", model_type="qwen2")


MIXED = "hi <s> x</s> <|user|> y<|tool|> <pad> it's  <|old|>1234 cafe\u0301 ."
CHANGES = [
    *(named_in_the_configuration_alone, more_tokens, extra_tokens, extra_named_tokens, another_named_token),
    *(
        not_special_in_the_file,
        split_special_tokens,
        other_flags,
        tokens_of_old_folders,
        begins_and_ends,
        pads,
        class_of_the_family,
    ),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_what_the_configuration_adds_to_tokenizer_json_counts(
    tmp_path: Path, tokenizer_class: str, change: Callable[[Path], None]
) -> None:
    from transformers import AutoTokenizer

    folder = byte_level(tmp_path / "model", bos=True)
    edit(folder / "config.json", model_type="llama")
    edit(folder / "tokenizer_config.json", tokenizer_class=tokenizer_class)
    change(folder)
    export_tokenizer(model(folder, **json.loads((folder / "config.json").read_text())), tmp_path / "exported")
    codec, reference = TextCodec.load(tmp_path / "exported"), AutoTokenizer.from_pretrained(folder)
    for text in (MIXED, *TEXT[:3]):
        ids = reference(text).input_ids
        assert codec.encode(text) == ids
        pieces = codec.detokenizer([])
        assert "".join([*(pieces.add([one]) for one in ids), pieces.finish()]) == reference.decode(ids, True)
    chat = [{"role": "user", "content": "Hi"}]
    rendered = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert codec.render_chat(chat) == rendered


def as_version_4_writes_it(folder: Path) -> None:
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    decoder = {str(token.pop("id")): token for token in added}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=decoder, clean_up_tokenization_spaces=False)
    edit(folder / "special_tokens_map.json", bos_token="<s>", eos_token=flags("</s>"))


@pytest.mark.parametrize("kind", ["byte-level", "sentence piece", "version 4", "tiny", "converted"])
def test_a_plain_tokenizer_is_copied_without_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    make = sentence_piece if kind == "sentence piece" else byte_level
    folder = Path(tiny_model()) if kind == "tiny" else make(tmp_path / "model")
    if kind == "version 4":
        as_version_4_writes_it(folder)
    if kind == "converted":
        named = {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<s>",
            "pad_token": "</s>",
            "chat_template": None,
        }
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 99, **named}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setitem(sys.modules, "transformers", None)
    export_tokenizer(model(folder), tmp_path / "exported")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "exported" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("damage", ["cut", "no vocabulary"])
def test_a_damaged_tokenizer_is_found_before_the_frontend_reads_it(tmp_path: Path, damage: str) -> None:
    folder = byte_level(tmp_path / "model")
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"] = {"type": "WordPiece", "vocab": {}, "unk_token": "[UNK]", "max_input_chars_per_word": 9}
    values["model"]["continuing_subword_prefix"] = "##"
    file.write_text(file.read_text()[:-100] if damage == "cut" else json.dumps(values))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    info = model(folder)
    with pytest.raises(BrokenCheckpoint, match=r"tokenizer\.json of .*model is damaged"):
        export_tokenizer(info, tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_transformers_made_is_kept_until_the_files_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "cache"))
    monkeypatch.setattr(tokenizer_cache, "MOST", 1)
    folder = byte_level(tmp_path / "model")
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    info = model(folder)
    export_tokenizer(info, tmp_path / "first")
    with monkeypatch.context() as without:
        without.setattr(transformers, "AutoTokenizer", None)
        export_tokenizer(info, tmp_path / "second")
        names = sorted(file.name for file in (tmp_path / "first").iterdir())
        assert names == sorted(file.name for file in (tmp_path / "second").iterdir())
        for name in names:
            assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
        config.write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 77}))
        with pytest.raises(BrokenCheckpoint):
            export_tokenizer(info, tmp_path / "third")
    export_tokenizer(info, tmp_path / "third")
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 1
