"""The tokenizer's files in one form, for the frontend: tokenizer.json, tokenizer_config.json, chat_template.jinja."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from miinb.engine import tokenizer_cache
from miinb.engine.spec import names_of_transformers
from miinb.errors import BrokenCheckpoint
from miinb.messages import EngineInfo
from miinb.models import ModelInfo

#: The chat template of a model that has none, for the task conversational: that of DialoGPT and of transformers'
#: conversational pipeline for gpt2. Every text is followed by the end token, or by a line's end where there is none.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{{ eos_token | default('\\n') }}{% endfor %}"
)


def ensure_chat_template(folder: Path) -> bool:
    """Give an exported tokenizer the plain chat template if it has none. Returns whether it is the model's own."""
    file = folder / "chat_template.jinja"
    if not file.exists():
        file.write_text(PLAIN_CHAT_TEMPLATE, encoding="utf-8")
    return file.read_text(encoding="utf-8") != PLAIN_CHAT_TEMPLATE


def export_tokenizer(info: ModelInfo, target: Path, *, trust_remote_code: bool = False, dummy: bool = False) -> None:
    """Write the model's tokenizer to `target`, which is made if it is not there.

    A tokenizer.json that transformers takes as it is gets copied. Of all others (and GGUF) transformers may build
    another pipeline than the file says, so it loads the tokenizer and saves what it has built: the frontend's token ids
    are then those of AutoTokenizer. A configuration alone (`dummy`) gets a stand-in that turns every byte of text into
    a token and every token into some text.

    Raises:
        BrokenCheckpoint: there is no tokenizer, or transformers cannot read it.
    """
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tokenizer-") as folder:
        made = Path(folder)
        _write(info, made, trust_remote_code=trust_remote_code, dummy=dummy)
        _check(made / "tokenizer.json", info)
        for file in made.iterdir():  # the frontend may be reading those of another replica
            os.replace(file, target / file.name)


def _check(file: Path, info: ModelInfo) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(file)).encode("a")  # what a vocabulary lacks shows only then
    except Exception as error:  # the library raises a bare Exception
        raise BrokenCheckpoint(f"tokenizer.json of {info.source} is damaged ({error}).", hint=_AGAIN) from None


def _write(info: ModelInfo, target: Path, *, trust_remote_code: bool, dummy: bool) -> None:
    if info.format != "gguf" and _taken_as_it_is(info):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(info.folder / name, target / name)
        template = _chat_template(info.folder)
    else:
        template = _convert(info, target, trust_remote_code=trust_remote_code, dummy=dummy)
    if template:
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")


_AGAIN = "Fetch the model again."
#: Tokenizer classes that are their tokenizer.json and nothing else, where the configuration adds nothing to it.
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
_NAMED = {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
_MORE_TOKENS = ("additional_special_tokens", "extra_special_tokens")
#: What else tokenizer_config.json may say of a tokenizer.json without a change to its tokens and texts.
_HARMLESS = {
    *("added_tokens_decoder", "backend", "chat_template", "clean_up_tokenization_spaces", "is_local"),
    *("local_files_only", "max_length", "model_input_names", "model_max_length", "name_or_path", "pad_to_multiple_of"),
    *("pad_token_type_id", "padding_side", "processor_class", "stride", "tokenizer_class", "truncation_side"),
    "truncation_strategy",
}
#: The source of transformers' choice of a class: families that have theirs whatever the configuration says.
_CHOICE, _OWN_CLASS = "models/auto/tokenization_auto.py", r'(?m)^    "([\w.-]+)",$'


def _taken_as_it_is(info: ModelInfo) -> bool:
    """Whether AutoTokenizer is known to make of the folder just what its tokenizer.json says."""
    file = info.folder / "tokenizer_config.json"
    if not (info.folder / "tokenizer.json").exists() or not file.exists():
        return False
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        generic = config.get("tokenizer_class") in _GENERIC
    except (ValueError, AttributeError) as error:
        raise BrokenCheckpoint(f"{file} is damaged ({error}).", hint=_AGAIN) from None
    names = [str(info.config.get(key)) for key in ("model_type", "model_name")]
    if not generic or not names_of_transformers(_CHOICE, _OWN_CLASS).isdisjoint(names):
        return False
    if "added_tokens_decoder" not in config and any((info.folder / name).exists() for name in _OLD_FILES):
        return False
    try:
        return _adds_nothing(config, json.loads((info.folder / "tokenizer.json").read_text(encoding="utf-8")))
    except ValueError:
        return True  # damaged, which `_check` tells
    except (KeyError, TypeError, AttributeError):
        return False  # transformers has the word


#: Where tokens stand in folders of before `added_tokens_decoder`.
_OLD_FILES = ("special_tokens_map.json", "added_tokens.json")


def _adds_nothing(config: dict[str, Any], tokenizer: dict[str, Any]) -> bool:
    """Whether tokenizer.json has all tokens that tokenizer_config.json names, and this says no more that counts."""
    if not config.keys() <= {*_HARMLESS, *_NAMED, *_MORE_TOKENS}:
        return False
    if tokenizer.get("padding") and "pad_token" not in config:
        return False  # its token would be added
    added = {str(token["id"]): {**token, "id": None} for token in tokenizer["added_tokens"]}
    decoder = config.get("added_tokens_decoder", {})
    if any(added.get(number) != {**token, "id": None} for number, token in decoder.items()):
        return False
    tokens = [config.get(name) for name in _NAMED]
    for name in _MORE_TOKENS:
        more = config.get(name) or []
        tokens += more if isinstance(more, list) else [more]
    texts = {token["content"] for token in added.values() if token.get("special")}  # as transformers makes them
    return all((token["content"] if isinstance(token, dict) else token) in texts for token in tokens if token)


def _chat_template(folder: Path) -> str | None:
    """The chat template, from its own file or from where older versions keep it."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            continue
        try:
            template = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
        except ValueError as error:
            raise BrokenCheckpoint(f"{folder / name} is damaged ({error}).", hint=_AGAIN) from None
        if isinstance(template, list):  # several named ones
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default", template[0]["template"])
        if template:
            return str(template)
    return None


def _convert(info: ModelInfo, target: Path, *, trust_remote_code: bool, dummy: bool) -> str | None:
    place = None if dummy or trust_remote_code else tokenizer_cache.place_of(info)
    if place is not None and tokenizer_cache.fetch(place, target):
        return _chat_template(target)
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"gguf_file": info.files[0].name} if info.format == "gguf" else {}
    _check_ids(info.folder / "tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(info.folder, trust_remote_code=trust_remote_code, **options)
        tokenizer.save_pretrained(target)
        if not (target / "tokenizer.json").exists():
            raise ValueError("it has no fast form")
        _tell_inputs(target, tokenizer.model_input_names)
    except Exception as error:  # transformers raises anything from OSError to KeyError here
        if dummy:
            _stand_in(info.vocab_size, target)
            return None
        raise BrokenCheckpoint(
            f"transformers cannot load the tokenizer of {info.source} ({error}).",
            hint="A model folder has a tokenizer.json, and a config.json that transformers can read.",
        ) from error
    if place is not None:
        tokenizer_cache.keep(target, place)
    return _chat_template(target)


#: Token ids above it are no vocabulary's; transformers would make a list of so many.
_MOST_IDS = 1 << 26


def _check_ids(file: Path) -> None:
    """Refuse a vocabulary with ids that no model has. Raises BrokenCheckpoint."""
    try:
        vocab = json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
        highest = max(vocab.values(), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # another kind of file, or a damaged one: transformers has the word
    if isinstance(highest, int) and highest > _MOST_IDS:
        raise BrokenCheckpoint(f"{file} has a token with the id {highest}, which no model has.", hint=_AGAIN)


def _tell_inputs(folder: Path, names: list[str]) -> None:
    """Write which inputs the tokenizer makes, which transformers has in its class (not all make types)."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"model_input_names": list(names)}, indent=2), encoding="utf-8")


def _stand_in(vocab_size: int, target: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet[:vocab_size])}
    vocab |= {f"\u0120w{i}": i for i in range(len(vocab), vocab_size)}  # U+0120 is byte-level BPE's blank
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(target / "tokenizer.json"))
    (target / "tokenizer_config.json").write_text("{}", encoding="utf-8")


def eos_token_ids(model: ModelInfo) -> tuple[int, ...]:
    """The tokens that end an answer: generation_config.json's, else config.json's. What is no token ends none."""
    file = model.folder / "generation_config.json"
    values: dict[str, Any] = {}
    if file.exists():
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            values = {}  # transformers itself only warns about a damaged one
    ids = values.get("eos_token_id", model.config.get("eos_token_id"))
    listed = ids if isinstance(ids, list) else [ids]
    return tuple(one for one in listed if isinstance(one, int) and 0 <= one < model.vocab_size)


def with_chat_template(info: EngineInfo, tokenizer: Path) -> EngineInfo:
    """See that there is a chat template; the plan says which."""
    line = ("chat template", "the model's", "it brings one")
    if not ensure_chat_template(tokenizer):
        line = ("chat template", "plain", "the model has none: every text is followed by its end token")
    return dataclasses.replace(info, plan=info.plan.with_line(*line))
