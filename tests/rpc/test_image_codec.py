"""Text-to-image's messages as bytes: nothing is lost, and what is no request is refused by name."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miinb import errors
from miinb.image_messages import ImagesEnd, ImagesEvent, ImagesProgress, ImagesRequest, Picture, Source
from miinb.image_params import MAX_PROMPT, ImageParams, parse_images
from miinb.rpc import image_codec
from miinb.rpc import inference_pb2 as pb
from tests.filled import IMAGE_PARAMS, filled


def test_no_field_of_a_request_is_lost() -> None:
    request = filled(ImagesRequest)
    assert image_codec.decode_images(image_codec.encode_images(request)) == request
    assert set(IMAGE_PARAMS.model_fields_set) == set(ImageParams.model_fields)
    empty = ImagesRequest("", ImageParams())
    assert image_codec.decode_images(image_codec.encode_images(empty)) == empty


@pytest.mark.parametrize("cls", [ImagesProgress, Picture, ImagesEnd])
def test_no_field_of_an_event_is_lost(cls: type[ImagesEvent]) -> None:
    event = filled(cls)
    data, file = image_codec.encode_images_event(event)
    assert file == getattr(event, "data", b"")
    assert image_codec.decode_images_event(data, file) == event
    assert image_codec.decode_images_event(image_codec.joined(data, file)) == event


@pytest.mark.parametrize(
    ("json", "words"),
    [
        ('{"heigth": 64}', "heigth"),
        ('{"height": 60}', "multiple of 8"),
        ('{"num_inference_steps": 0}', "num_inference_steps"),
        ('{"guidance_scale": NaN}', "guidance_scale"),
        ('{"width": 4096}', "width"),
        ('{"num_images_per_prompt": 65}', "num_images_per_prompt"),
        ('{"negative_prompt": "x", "guidance_scale": 1}', "negative_prompt"),
        ("[1]", "not an object"),
        ("{", "not JSON"),
    ],
)
def test_a_wrong_parameter_from_any_client_is_named(json: str, words: str) -> None:
    data = pb.ImagesRequest(prompt="a", parameters_json=json).SerializeToString()
    with pytest.raises(errors.InvalidRequest, match=words):
        image_codec.decode_images(data)


def test_what_no_text_or_too_long_is_refused_on_both_sides() -> None:
    with pytest.raises(errors.InvalidRequest, match="surrogate"):
        image_codec.encode_images(ImagesRequest("\ud800", ImageParams()))
    with pytest.raises(errors.InvalidRequest, match="negative_prompt"):
        parse_images({"negative_prompt": "\ud800"})
    long = "a" * (MAX_PROMPT + 1)
    with pytest.raises(errors.InvalidRequest, match=str(MAX_PROMPT)):
        image_codec.encode_images(ImagesRequest(long, ImageParams()))
    with pytest.raises(errors.InvalidRequest, match=str(MAX_PROMPT)):
        image_codec.decode_images(pb.ImagesRequest(prompt=long).SerializeToString())
    whole = replace(filled(ImagesRequest), prompt=long[1:])
    assert image_codec.decode_images(image_codec.encode_images(whole)) == whole


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_junk_is_an_invalid_request_or_a_request(data: bytes) -> None:
    with contextlib.suppress(errors.InvalidRequest):
        image_codec.decode_images(data)


def test_of_a_files_name_no_folder_and_no_endless_text_is_kept() -> None:
    for sent, kept in (("/home/me/cat.png", "cat.png"), ("C:\\me\\cat.png", "cat.png"), ("x" * 999, "x" * 255)):
        data = image_codec.encode_images(ImagesRequest("a", ImageParams(), image=Source(sent, b"x")))
        found = image_codec.decode_images(data)
        assert found.image == Source(kept, b"x")
        assert found.mask is None
