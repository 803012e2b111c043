"""MII's calls for every encoder task, from `deploy` to `terminate`: its request keys in, data with its fields out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

import miinb
import miinb as mii
from miinb.errors import DeploymentNotFound, InvalidRequest
from tests.engine.test_baseline import save_bert

TEXT = {"query": "deep [MASK] is great"}
PAIR = {"question": "is the model great", "context": "the deep model is great ."}
#: Task, transformers' class, a request, options, and what each of its answers holds.
TASKS: list[tuple[str, str, dict[str, str], dict[str, Any], set[str]]] = [
    ("text-classification", "BertForSequenceClassification", TEXT, {"top_k": 2}, {"label", "score"}),
    ("token-classification", "BertForTokenClassification", TEXT, {}, {"entity", "score", "word", "start", "end"}),
    ("question-answering", "BertForQuestionAnswering", PAIR, {"top_k": 2}, {"answer", "score", "start", "end"}),
    ("fill-mask", "BertForMaskedLM", TEXT, {"top_k": 2}, {"token_str", "score", "token", "sequence"}),
    ("feature-extraction", "BertModel", TEXT, {"normalize": True}, {"embedding"}),
]


@pytest.mark.parametrize(("task", "head", "request_dict", "options", "fields"), TASKS)
def test_deploy_query_terminate(
    task: str,
    head: str,
    request_dict: dict[str, str],
    options: dict[str, Any],
    fields: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = save_bert(getattr(transformers, head), tmp_path / "model")
    assert mii.deploy(task, str(folder), "d", mii_config={"dtype": "fp16", "max_tokens": 32}) is None
    try:
        handle = mii.mii_query_handle("d")
        reply = handle.query(request_dict)
        assert reply.time_taken >= reply.model_time_taken > 0
        first = reply.response if task == "question-answering" else reply.response[0]
        assert isinstance(first, dict)
        assert fields <= set(first)
        several = handle.query(request_dict, **options).response
        assert isinstance(several, list)
        assert len(several) == options.get("top_k", len(reply.response))
        lists = {name: [text, text, text] for name, text in request_dict.items()}
        many = handle.query(lists, **options).response
        assert len(many) == 3
        assert [set(answers[0]) for answers in many] == [set(several[0])] * 3
        with pytest.raises(InvalidRequest, match="not a key of"):
            handle.query({**request_dict, "text": "a"})
        assert len(miinb.attach("d").predict([request_dict] * 2)) == 2
    finally:
        mii.terminate("d")
    with pytest.raises(DeploymentNotFound):
        mii.mii_query_handle("d")
