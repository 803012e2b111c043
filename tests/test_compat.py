"""MII's own calls: the three snippets of its README, and every option honored, accepted, redirected or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import miinb
import miinb as mii
from miinb import compat
from miinb.demo import tiny_model
from miinb.errors import DeploymentNotFound, InvalidRequest, InvalidValue, TargetError, UnknownOption
from miinb.results import ConversationReply


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"tensor_parallel": 1, "dtype": "fp16"}, {"tensor_parallel": 1, "dtype": "fp16"}),
        ({"dtype": "torch.bfloat16", "replica_num": 2}, {"dtype": "bf16", "replicas": 2}),
        ({"deploy_rank": 3}, {"gpus": [3]}),
        ({"deploy_rank": [0, 1], "tensor_parallel": 2}, {"gpus": [0, 1], "tensor_parallel": 2}),
        ({"deploy_rank": -1}, {}),
        ({"max_tokens": 512, "port_number": 50050}, {"max_length": 512, "port": 50050}),
        ({"enable_cuda_graph": False}, {"options": {"cuda_graphs": False}}),
        ({"replace_with_kernel_inject": False}, {"engine": "baseline"}),
        ({"replace_with_kernel_inject": True, "trust_remote_code": False}, {"trust_remote_code": False}),
        ({"skip_model_check": True, "meta_tensor": True, "profile_model_time": True, "torch_dist_port": 29500}, {}),
        ({"enable_restful_api": False, "checkpoint_dict": None}, {}),
    ],
)
def test_honored_and_accepted_options(config: dict[str, Any], options: dict[str, Any]) -> None:
    assert compat.session_options(config) == options


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"tensor_paralel": 2}, UnknownOption, "tensor_parallel"),
        ({"checkpoint_dict": {"checkpoints": []}}, InvalidValue, "folder as model"),
        ({"hostfile": "/job/hostfile"}, InvalidValue, "deploy_rank"),
        ({"enable_restful_api": True}, InvalidValue, "not there yet"),
        ({"dtype": "fp17"}, InvalidValue, "fp16"),
    ],
)
def test_refused_options_say_what_to_do(config: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        compat.session_options(config)


ZERO = {"enable_zero": True, "enable_deepspeed": False}


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"deployment_type": mii.constants.DeploymentType.AML}, TargetError, "not there yet"),
        ({"deployment_type": "locl"}, InvalidValue, "local"),
        ({"enable_zero": True}, InvalidValue, r"select only one\. Set enable_deepspeed=False\."),
        ({"ds_config": {"zero_optimization": {"stage": 3}}}, InvalidValue, "only with enable_zero"),
        (
            {"enable_zero": True, "enable_deepspeed": False, "ds_config": {"zero_optimization": {"stage": 2}}},
            InvalidValue,
            "stage is 2; offloading needs stage 3",
        ),
        (
            {"enable_zero": True, "enable_deepspeed": False, "mii_config": {"dtype": "fp16"}},
            InvalidValue,
            "MII dtype and ZeRO dtype must match",
        ),
        ({"enable_zero": True, "enable_deepspeed": False, "ds_config": "no.json"}, InvalidValue, "no file of JSON"),
        (ZERO | {"ds_config": [1]}, InvalidValue, r"ds_config: give a dictionary, not \[1\]"),
        (
            ZERO | {"ds_config": {"zero_optimization": "x"}},
            InvalidValue,
            "zero_optimization: give a dictionary, not 'x'",
        ),
        (
            ZERO | {"ds_config": {"zero_optimization": {"offload_param": "cpu"}}},
            InvalidValue,
            r"zero_optimization\.offload_param: give a dictionary, not 'cpu'",
        ),
        (
            ZERO | {"ds_config": {"bf16": {"enabled": "auto"}}},
            InvalidValue,
            "bf16.enabled: give True or False, not 'auto'",
        ),
        (ZERO | {"ds_config": {"fp16": True}}, InvalidValue, "fp16: give a dictionary, not True"),
        (
            ZERO | {"ds_config": {"fp16": {"enabled": True}, "bf16": {"enabled": True}}},
            InvalidValue,
            "fp16 and bf16 are both on",
        ),
        ({"model_path": "/tmp/mii_models"}, InvalidValue, "HF_HUB_CACHE"),
        ({"task": "text-generatoin"}, InvalidValue, "text-generation"),
        ({"version": 2}, InvalidValue, "Azure ML"),
    ],
)
def test_deploy_refuses_before_it_starts_anything(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    values = {"task": "text-generation", "model": str(tiny_model()), "deployment_name": "refused", **arguments}
    with pytest.raises(error, match=says):
        mii.deploy(**values)
    assert "refused" not in [status.name for status in mii.deployments()]


@pytest.fixture(scope="module")
def deployed() -> Iterator[str]:
    """The deployment of the first snippet, with a model that is here."""
    name = "tiny_deployment"
    mii_configs = {"tensor_parallel": 1, "dtype": "fp16"}
    returned = mii.deploy(task="text-generation", model=str(tiny_model()), deployment_name=name, mii_config=mii_configs)
    assert returned is None
    yield name
    mii.terminate(name)
    with pytest.raises(DeploymentNotFound):
        mii.mii_query_handle(name)


def test_the_query_snippet(deployed: str) -> None:
    generator = mii.mii_query_handle(deployed)
    request = {"query": ["DeepSpeed is", "Seattle is"]}
    result = generator.query(request, do_sample=True, max_new_tokens=30)
    assert len(result.response) == 2
    assert result.response[0].startswith("DeepSpeed is")
    assert result.response[1].startswith("Seattle is")
    assert result.time_taken >= result.model_time_taken > 0
    assert request == {"query": ["DeepSpeed is", "Seattle is"]}  # MII changed its caller's dictionary
    assert "DeepSpeed is" in str(result)


def test_a_conversation_remembers(deployed: str) -> None:
    handle = mii.mii_query_handle(deployed)
    handle.create_session("one")
    with pytest.raises(InvalidRequest, match="exists"):
        handle.create_session("one")
    first = handle.query({"query": "Once upon a time,"}, session_id="one", max_new_tokens=12).response[0]
    second = handle.query({"query": " Then"}, session_id="one", max_new_tokens=4).response[0]
    assert second.startswith(first + " Then")
    handle.destroy_session("one")
    with pytest.raises(InvalidRequest, match="does not exist"):
        handle.query({"query": "x"}, session_id="one")


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A conversational deployment of a model without a chat template."""
    folder = shutil.copytree(tiny_model(), tmp_path_factory.mktemp("plain") / "model")
    (folder / "chat_template.jinja").unlink()
    kind = mii.constants.DeploymentType.NON_PERSISTENT
    mii.deploy("conversational", str(folder), "talker", kind, mii_config={"dtype": "fp32", "max_tokens": 256})
    yield "talker"
    mii.terminate("talker")


def test_a_conversation_in_miis_way(talker: str) -> None:
    handle = mii.mii_query_handle(talker)
    said: dict[str, Any] = {"text": "Hi", "conversation_id": 3, "past_user_inputs": [], "generated_responses": []}
    first = handle.query(said, max_new_tokens=8)
    assert isinstance(first, ConversationReply)
    assert (first.conversation_id, first.past_user_inputs, len(first.generated_responses)) == ("3", ["Hi"], 1)
    assert first.time_taken >= first.model_time_taken > 0
    again = handle.query({"text": "Hi"}, max_new_tokens=8)
    assert isinstance(again, ConversationReply)
    assert again.generated_responses == first.generated_responses
    past = {"past_user_inputs": first.past_user_inputs, "generated_responses": first.generated_responses}
    second = handle.query({"text": "And then?", **past}, max_new_tokens=8)
    assert isinstance(second, ConversationReply)
    assert second.past_user_inputs == ["Hi", "And then?"]


def test_a_session_says_what_the_whole_history_says(talker: str) -> None:
    """Two handles take turns in one session, until it outgrows the context; the answers are those of plain chats."""
    one, two = mii.mii_query_handle(talker), miinb.session.Session._of(miinb.attach(talker)._deployment)
    one.create_session("shared")
    messages: list[dict[str, str]] = []
    dropped = 0
    for number in range(12):
        text = f"Tell me more about number {number}, please."
        handle = one if number % 2 else two
        reply = handle.query({"text": text}, session_id="shared", max_new_tokens=16)
        assert isinstance(reply, ConversationReply)
        messages = [*messages[dropped:], {"role": "user", "content": text}]
        plain = two.chat(messages, max_new_tokens=16)
        dropped = plain.dropped_messages
        assert plain.usage.cached_tokens > plain.usage.prompt_tokens // 2, "the session's turn left its prompt"
        assert reply.dropped_messages == dropped
        assert reply.generated_responses[-1] == plain.text
        messages.append({"role": "assistant", "content": plain.text})
    assert 2 < len(messages) < 24
    assert reply.past_user_inputs == [m["content"] for m in messages[dropped:] if m["role"] == "user"]
    one.destroy_session("shared")


def test_the_plan_tells_the_plain_template(talker: str) -> None:
    lines = {line.what: line.choice for line in miinb.attach(talker).plan().lines}
    assert lines["chat template"] == "plain"


def test_it_is_persistent_and_fp16_follows_the_device(deployed: str) -> None:
    status = next(status for status in mii.deployments() if status.name == deployed)
    assert status.persist
    assert status.dtype == ("fp16" if status.device == "cuda" else "bf16")


def test_an_unknown_name_is_refused_with_the_near_one(deployed: str) -> None:
    with pytest.raises(DeploymentNotFound, match=deployed):
        mii.mii_query_handle("tiny_deploymen")
    with pytest.raises(DeploymentNotFound):
        mii.terminate("no_such_deployment")


def test_zero_inference_as_mii_has_it(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    place = {"device": "cpu", "pin_memory": False}
    file.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3, "offload_param": place}}))
    prompts = {"query": ["Once upon a time, there was"]}
    answers = []
    for arguments in ({"enable_zero": True, "ds_config": str(file)}, {"mii_config": {"dtype": "bf16"}}):
        mii.deploy("text-generation", str(tiny_model()), "zero", "non-persistent", enable_deepspeed=False, **arguments)
        try:
            handle = mii.mii_query_handle("zero")
            answers.append(handle.query(prompts, max_new_tokens=8, do_sample=False).response)
            plan = str(handle._session.plan())
            assert ("ZeRO-Inference" in plan) == ("enable_zero" in arguments)
        finally:
            mii.terminate("zero")
    assert answers[0] == answers[1]
