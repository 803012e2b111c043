"""models.py and checkpoint.py: facts from headers, and errors that name the file."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import miinb.models as models
from miinb import Session, location
from miinb.engine.policies import ENCODERS, POLICIES
from miinb.errors import BrokenCheckpoint, InvalidValue, ModelError, ModelNotFound, UnsupportedModel

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 32,
}


def write_safetensors(file: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    header, at = {}, 0
    for name, shape in tensors.items():
        size = 2
        for extent in shape:
            size *= extent
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(at))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "tiny-llama"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(LLAMA))
    write_safetensors(place / "model.safetensors", {"a": (32, 8), "b": (3,)})
    return place


def write_gguf(file: Path, fields: dict[str, object], tensors: dict[str, tuple[int, ...]], cut: int = 0) -> None:
    import numpy
    from gguf import GGUFWriter

    writer = GGUFWriter(file, str(fields.pop("architecture")))
    for name, value in fields.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_float32(name, value)
    for name, shape in tensors.items():
        writer.add_tensor(name, numpy.zeros(shape, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if cut:
        file.write_bytes(file.read_bytes()[:-cut])


def test_facts_of_a_folder(folder: Path) -> None:
    info = models.inspect(folder)
    assert (info.family, info.layers, info.kv_heads, info.head_size, info.context_length) == ("llama", 2, 2, 2, 64)
    norms = 2 * 2 * 8 + 8
    assert info.parameters == 2 * (8 * 2 * 12 + 3 * 8 * 16) + 2 * 32 * 8 + norms  # of the decoder, not of these files
    assert info.dtype == "bf16"
    assert info.bytes_by_dtype == {"BF16": 2 * (32 * 8 + 3)}
    assert info.weights_bytes("fp32") == 4 * info.parameters
    assert info.kv_bytes_per_token() == 2 * 2 * 2 * 2 * 2
    assert info.optimized
    assert info.task() == "text-generation"
    assert info.task("conversational") == "conversational"


def test_task_is_asked_for_or_told(folder: Path) -> None:
    info = models.inspect(folder)
    with pytest.raises(UnsupportedModel, match="does not serve fill-mask"):
        info.task("fill-mask")
    with pytest.raises(InvalidValue, match="no task 'text-generatoin'"):
        info.task("text-generatoin")
    (folder / "config.json").write_text(json.dumps(LLAMA | {"architectures": []}))
    with pytest.raises(InvalidValue, match="does not tell its task"):
        models.inspect(folder).task()


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", "8"), ("num_attention_heads", 4.0), ("vocab_size", True), ("rms_norm_eps", "1")],
)
def test_a_number_of_the_configuration_that_is_none_is_named(folder: Path, field: str, value: object) -> None:
    (folder / "config.json").write_text(json.dumps(LLAMA | {field: value}))
    with pytest.raises(BrokenCheckpoint, match=f"{field} is {value!r}"):
        models.inspect(folder)


@pytest.mark.parametrize("damage", ["truncate", "grow", "header", "empty", "shape"])
def test_damaged_safetensors_is_named(folder: Path, damage: str) -> None:
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    changed = {
        "truncate": raw[:-1],
        "grow": raw + b"x",
        "header": raw[:8] + b"}" + raw[9:],
        "empty": b"",
        "shape": raw.replace(b"[3]", b"[4]"),
    }[damage]
    file.write_bytes(changed)
    with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors"):
        models.inspect(folder)


def test_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BrokenCheckpoint, match="model-00002-of-00002"):
        models.inspect(folder)


def test_no_weights_says_what_to_do(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(BrokenCheckpoint) as error:
        models.inspect(folder)
    assert "dummy" in error.value.hint
    info = models.inspect(folder, load_format="dummy")
    assert info.format == "none"
    assert info.parameters == 2 * (8 * 2 * 12 + 3 * 8 * 16) + 2 * 32 * 8 + 2 * 2 * 8 + 8
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match="pickle"):
        models.inspect(folder)


def test_a_family_without_a_policy_is_counted_from_its_files(folder: Path) -> None:
    (folder / "config.json").write_text(
        json.dumps(LLAMA | {"model_type": "newest", "architectures": ["NewForCausalLM"]})
    )
    info = models.inspect(folder)
    assert info.parameters == 32 * 8 + 3
    assert isinstance(info.unfused, UnsupportedModel)
    assert "newest" in info.unfused.message


def test_a_configuration_that_lacks_a_size_is_broken(folder: Path) -> None:
    values = {name: value for name, value in LLAMA.items() if name != "num_hidden_layers"}
    (folder / "config.json").write_text(json.dumps(values))
    unfused = models.inspect(folder).unfused
    assert isinstance(unfused, BrokenCheckpoint)
    assert "lacks 'num_hidden_layers'" in unfused.message


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModel, "quantized already (gptq)"),
        ({"hidden_act": "mish"}, UnsupportedModel, "'mish' has no fused form"),
        ({"hidden_act": "mush"}, BrokenCheckpoint, "there is no activation 'mush'"),
        ({"rope_parameters": {"rope_type": "proportional"}}, UnsupportedModel, "'proportional' has no fused form"),
        ({"rope_parameters": {"rope_type": "odd"}}, BrokenCheckpoint, "there is no rotary scaling of kind 'odd'"),
        ({"num_attention_heads": 0}, BrokenCheckpoint, "cannot be used"),
        ({"num_hidden_layers": None}, BrokenCheckpoint, "cannot be used"),
    ],
)
def test_what_has_no_fused_form_is_known_from_the_configuration(
    folder: Path, changes: dict[str, object], error: type[ModelError], words: str
) -> None:
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    info = models.inspect(folder)
    assert not info.optimized
    assert isinstance(info.unfused, error)
    assert words in info.unfused.message


def test_a_folder_without_a_tokenizer_is_refused_before_anything_starts(folder: Path) -> None:
    with pytest.raises(BrokenCheckpoint, match="has no tokenizer"):
        location.check_tokenizer(folder)
    with pytest.raises(BrokenCheckpoint, match="has no tokenizer"):
        Session(folder)
    (folder / "vocab.txt").write_text("a")
    location.check_tokenizer(folder)


def test_remote_code_is_refused_unless_asked(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(LLAMA | {"auto_map": {"AutoConfig": "x.Y"}}))
    with pytest.raises(UnsupportedModel, match="own Python code"):
        models.inspect(folder)
    assert models.inspect(folder, trust_remote_code=True).family == "llama"


@pytest.mark.parametrize("config", ["{", "[]", "{}"])
def test_bad_config(folder: Path, config: str) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError):
        models.inspect(folder)


def test_missing_folder_gives_the_near_name(folder: Path) -> None:
    with pytest.raises(ModelNotFound) as error:
        models.inspect(folder.parent / "tiny-lama")
    assert "tiny-llama" in error.value.hint


def test_hub_name_from_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hub"
    snapshot = cache / "models--someone--tiny" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    refs = cache / "models--someone--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert models.inspect("someone/tiny").family == "llama"
    with pytest.raises(ModelNotFound) as error:
        models.inspect("someone/tinny")
    assert "someone/tiny" in error.value.hint


GGUF = {
    "architecture": "llama",
    "llama.block_count": 1,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 16,
    "llama.context_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.tokens": ["a", "b", "c"],
    "tokenizer.ggml.eos_token_id": 2,
}


def test_gguf_file_and_folder(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, dict(GGUF), {"token_embd.weight": (3, 8), "blk.0.attn_k.weight": (4, 8)})
    for place in (file, tmp_path):
        info = models.inspect(place)
        assert (info.format, info.family, info.vocab_size, info.kv_heads) == ("gguf", "llama", 3, 2)
        assert info.tensors["token_embd.weight"].shape == (3, 8)
        assert info.config["tie_word_embeddings"] is True
        assert info.config["eos_token_id"] == 2


def test_gguf_truncated_or_of_another_family(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, dict(GGUF), {"token_embd.weight": (3, 8)}, cut=40)
    with pytest.raises(BrokenCheckpoint, match=r"tiny\.gguf"):
        models.inspect(file)
    write_gguf(file, GGUF | {"architecture": "mamba"}, {"token_embd.weight": (3, 8)})
    with pytest.raises(UnsupportedModel, match="mamba"):
        models.inspect(file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(BrokenCheckpoint, match=r"tiny\.gguf"):
        models.inspect(file)


def test_table_of_families_is_the_modules_call() -> None:
    table = models()  # type: ignore[operator]
    assert {row.family for row in table if row.optimized} == {*POLICIES, *ENCODERS, "stable-diffusion"}
    assert {row.family for row in table} > {"mpt", "albert"}
    assert "mistral" in repr(table)


def test_inspecting_never_imports_torch(folder: Path) -> None:
    code = f"import miinb.models as m, sys; m.inspect({str(folder)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
