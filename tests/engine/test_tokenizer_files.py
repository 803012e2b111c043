"""The frontend tokenizes with the exported files as AutoTokenizer does with the model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from miinb.engine import tokenizer_cache
from miinb.engine.tokenizer_files import export_tokenizer
from miinb.errors import BrokenCheckpoint
from miinb.server.text import TextCodec
from tests.tiny_tokenizers import TEXT, byte_level, sentence_piece


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
    info: Any = SimpleNamespace(format="safetensors", folder=folder, source=folder, files=(), vocab_size=500)
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


@pytest.mark.parametrize("damage", ["cut", "no vocabulary"])
def test_a_damaged_tokenizer_is_found_before_the_frontend_reads_it(tmp_path: Path, damage: str) -> None:
    folder = byte_level(tmp_path / "model")
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"] = {"type": "WordPiece", "vocab": {}, "unk_token": "[UNK]", "max_input_chars_per_word": 9}
    values["model"]["continuing_subword_prefix"] = "##"
    file.write_text(file.read_text()[:-100] if damage == "cut" else json.dumps(values))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    info: Any = SimpleNamespace(format="safetensors", folder=folder, source=folder, files=(), vocab_size=500)
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
    info: Any = SimpleNamespace(format="safetensors", folder=folder, source=folder, files=(), vocab_size=500)
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
