"""The wire: what goes in comes out, every error survives the trip, junk is InvalidRequest."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import grpc
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miinb import errors
from miinb.config import GenerationParams
from miinb.messages import Chunk, GenerateRequest, PredictedEvent, RequestBegin, RequestEnd, SequenceEnd
from miinb.rpc import codec, failures, image_codec
from miinb.rpc import inference_pb2 as pb
from tests.filled import PARAMS, filled


def call_of(failure: failures.Failure) -> Any:
    """A failed call as a client sees it."""
    return SimpleNamespace(
        code=lambda: failure.code, details=lambda: failure.text, trailing_metadata=lambda: failure.metadata
    )


@pytest.mark.parametrize("name", sorted(errors.all_errors()))
def test_every_error_comes_back_as_itself(name: str) -> None:
    cls = errors.all_errors()[name]
    failure = failures.failure_of(cls("What happened: é.", hint="What to do: 日本.", details="a path, a traceback"))
    back = failures.error_of(call_of(failure))
    assert type(back) is cls
    assert (back.message, back.hint, back.details) == ("What happened: é.", "What to do: 日本.", "")
    assert failure.code is not grpc.StatusCode.OK


@pytest.mark.parametrize("name", sorted(c.__name__ for c in errors.RequestError.__subclasses__()))
def test_every_request_error_has_its_own_code(name: str) -> None:
    assert errors.all_errors()[name] in failures.STATUS


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_code_without_a_name_is_a_miinb_error(code: grpc.StatusCode) -> None:
    error = failures.error_of(call_of(failures.Failure(code, "", ())))
    assert isinstance(error, errors.MiinbError)
    assert error.message
    if code in failures.ERRORS:
        assert type(error) is failures.ERRORS[code]


def test_the_text_of_an_unexpected_exception_stays_in_the_log() -> None:
    noted: list[tuple[str, BaseException]] = []
    secret = FileNotFoundError("/home/user/secret prompt")
    failure = failures.failure_of(secret, lambda number, error: noted.append((number, error)))
    assert failure.code is grpc.StatusCode.INTERNAL
    assert "secret" not in failure.text + str(failure.metadata)
    assert [(number in failure.text, error) for number, error in noted] == [(True, secret)]


def test_a_message_above_the_limit_is_the_requests_fault() -> None:
    failure = failures.Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (9 vs. 4)", ())
    assert type(failures.error_of(call_of(failure))) is errors.InvalidRequest


@pytest.mark.parametrize(
    "request_",
    [
        GenerateRequest(
            "prompt é\n", GenerationParams(do_sample=True, temperature=0.7, seed=2**63 - 1, stop=["a"]), request_id="x"
        ),
        GenerateRequest("p", GenerationParams(logit_bias={5: -1.0, 0: 2.0}, do_sample=True)),
        GenerateRequest(None, GenerationParams(), ({"role": "user", "content": "Hi"},)),
    ],
)
def test_generate_requests(request_: GenerateRequest) -> None:
    assert codec.decode_generate(codec.encode_generate(request_)) == request_


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize(
    "asks", [{"messages": None}, {"prompt": None, "messages": ({"role": "user", "content": "é"},)}]
)
def test_no_field_of_a_request_is_lost(params: GenerationParams, asks: dict[str, Any]) -> None:
    request = replace(filled(GenerateRequest, params=params), **asks)  # a prompt or messages
    assert codec.decode_generate(codec.encode_generate(request)) == request


def test_a_lone_surrogate_is_refused_before_the_wire() -> None:
    with pytest.raises(errors.InvalidRequest, match="surrogate"):
        codec.encode_generate(GenerateRequest("a\ud800", GenerationParams()))


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ('{"temperature": NaN}', "temperature"),
        ('{"temperature": -1}', "temperature"),
        ('{"temperature": 1e300}', "temperature"),
        ('{"top_p": Infinity}', "top_p"),
        ('{"top_k": true}', "top_k"),
        ('{"temperature": "0.7"}', "temperature"),
        ('{"max_new_tokens": 2147483648}', "max_new_tokens"),
        ('{"seed": 18446744073709551616}', "seed"),
        ('{"logit_bias": {"x": 1}}', "logit_bias"),
        ('{"stop": ' + str(["s"] * 1000).replace("'", '"') + "}", "stop"),
        ('{"temprature": 1}', "temperature"),
        ('{"num_beams": 4, "do_sample": true}', "num_beams"),
        ("[1]", "parameters_json"),
        ("{", "parameters_json"),
        ("[" * 100_000, "parameters_json"),
    ],
)
def test_wrong_parameters_are_refused_by_name(parameters: str, field: str) -> None:
    data = pb.GenerateRequest(prompt="p", parameters_json=parameters).SerializeToString()
    with pytest.raises(errors.InvalidRequest) as caught:
        codec.decode_generate(data)
    assert field in caught.value.line()


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_junk_is_an_invalid_request_or_a_request(data: bytes) -> None:
    for decode in (codec.decode_generate, codec.decode_predict):
        with contextlib.suppress(errors.InvalidRequest):
            decode(data)


@pytest.mark.parametrize("cls", [RequestBegin, Chunk, SequenceEnd, RequestEnd])
def test_no_field_of_a_stream_event_is_lost(cls: type[codec.StreamEvent]) -> None:
    event = filled(cls)
    if isinstance(event, RequestEnd):
        clients = {"ttft_s": 0.0, "tpot_s": 0.0, "e2e_s": 0.0}  # measured where the answer arrives
        turns = ({"role": "user", "content": "é"},)
        event = replace(event, timing=replace(event.timing, **clients), history=turns)
    assert codec.decode_event(codec.encode_event(event)) == event


def test_predict_keeps_whole_numbers_and_nesting() -> None:
    inputs = [{"query": "é", "n": 3, "x": 0.5, "list": [1, None, {"deep": True}]}]
    assert codec.decode_predict(codec.encode_predict(inputs, {"top_k": 5})) == (inputs, {"top_k": 5})
    options = {"top_k": numpy.int64(3), "normalize": numpy.bool_(True), "targets": numpy.array(["a", "b"])}
    plain = {"top_k": 3, "normalize": True, "targets": ["a", "b"]}
    assert codec.decode_predict(codec.encode_predict(inputs, options)) == (inputs, plain)
    with pytest.raises(errors.InvalidRequest, match="options"):
        codec.encode_predict(inputs, {"top_k": 10**400})
    event = filled(PredictedEvent)
    assert codec.decode_predicted(codec.encode_predicted(event)) == event


def test_predict_refuses_what_json_cannot_say() -> None:
    with pytest.raises(errors.InvalidRequest, match=r"inputs\[1\]: it holds a lone surrogate"):
        codec.encode_predict([{"query": "a"}, {"query": "b\ud800"}], {})
    with pytest.raises(errors.InvalidRequest):
        codec.encode_predict([{"query": object()}], {})
    with pytest.raises(errors.NonFinite):
        codec.encode_predicted(PredictedEvent([math.nan], 0, 0, 0, 0))


def test_description() -> None:
    values = {"info": {"model": "é"}, "counters": {"requests": 3}}
    assert codec.decode_description(codec.encode_description(values)) == values


def test_the_service_has_the_name_of_the_proto() -> None:
    service = pb.DESCRIPTOR.services_by_name["Inference"]
    names = {f"/{service.full_name}/{method.name}" for method in service.methods}
    assert names == {
        codec.GENERATE,
        image_codec.GENERATE_IMAGES,
        codec.PREDICT,
        codec.CREATE_SESSION,
        codec.DESTROY_SESSION,
        codec.DESCRIBE,
    }
