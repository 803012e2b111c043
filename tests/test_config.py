import numpy as np
import pytest

from miinb.config import DeploymentConfig, EngineOptions, GenerationParams, parse_generation
from miinb.errors import InvalidRequest, InvalidValue, UnknownOption


def test_unknown_option_names_the_near_one() -> None:
    with pytest.raises(UnknownOption, match="dtyp") as caught:
        DeploymentConfig.parse({"model": "m", "dtyp": "fp16"})
    assert "'dtype'" in caught.value.hint


def test_unknown_engine_option_names_the_near_one() -> None:
    with pytest.raises(UnknownOption) as caught:
        DeploymentConfig.parse({"model": "m", "options": {"cuda_graph": True}})
    assert "cuda_graphs" in caught.value.hint


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"dtype": "float99"}, "dtype"),
        ({"tensor_parallel": 0}, "tensor_parallel"),
        ({"tensor_parallel": "2"}, "tensor_parallel"),
        ({"name": "../x"}, "name"),
        ({"gpus": [0, 0], "replicas": 2}, "gpus"),
        ({"gpus": [0, 1]}, "gpus"),
        ({"gpus": [0], "device": "cpu"}, "gpus"),
        ({"start_timeout_s": float("nan")}, "start_timeout_s"),
        ({"options": {"compile": True}}, "compile"),
    ],
)
def test_wrong_values_name_their_field(values: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidValue, match=field):
        DeploymentConfig.parse({"model": "m", **values})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"options": {"calibration": ["fine", "\ud800"]}}, "options.calibration: it holds a lone surrogate"),
        ({"options": {"calibration": "\ud800"}}, "options.calibration: it holds a lone surrogate"),
        ({"revision": "\ud800"}, "revision: it holds a lone surrogate"),
        (
            {"options": {"offload": "cpu", "ds_config": {"a": object()}}},
            "options.ds_config: it holds something that is not of JSON",
        ),
        ({"options": {"offload": "cpu", "ds_config": {"fp16": [1]}}}, "options.ds_config: fp16: give a dictionary"),
    ],
)
def test_what_a_process_cannot_be_told_is_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        DeploymentConfig.parse({"model": "m", **values})
    assert caught.value.message.startswith(words)


def test_config_survives_json() -> None:
    config = DeploymentConfig.parse({"model": "m", "gpus": [[0, 1], [2, 3]], "tensor_parallel": 2, "replicas": 2})
    assert DeploymentConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"max_new_tokens": 2**31}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"temperature": "0.7"}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 1e-39, "do_sample": True}, "temperature: logits divided by less than 1e-30"),
        ({"top_p": -1}, "top_p"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ["x"] * 1000}, "stop"),
        ({"stop": 5}, "stop: give a list, not 5."),
        ({"stop": [5]}, "stop.0: give a text, not 5."),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {5: 1e39}}, "logit_bias"),
        ({"num_beams": 4, "do_sample": True}, "do_sample"),
        ({"num_beams": 4, "logprobs": 1}, "logprobs"),
        ({"num_beams": 4, "num_return_sequences": 5}, "num_return_sequences"),
        ({"num_beams": 0}, "num_beams"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"early_stopping": True}, "early_stopping"),
        ({"temprature": 0.5}, "Did you mean 'temperature'"),
        ({"max_lenght": 3}, "'max_lenght'. Use max_new_tokens"),
        ({"n": 2}, "Use num_return_sequences"),
        ({"logit_bias": {"5": 2.0}}, "logit_bias: the key '5' is no whole number"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"top_p": 0.9}, "top_p"),
    ],
)
def test_wrong_generation_parameters_are_refused_by_name(values: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_generation(values)
    assert field in caught.value.line()


@pytest.mark.parametrize(
    ("field", "given", "meant"),
    [("engine", "optimised", "optimized"), ("dtype", "FP16", "fp16"), ("dtype", "float16", "fp16"),
     ("device", "gpu", "cuda"), ("load_format", "dumy", "dummy")],
)  # fmt: skip
def test_a_wrong_choice_names_the_near_one(field: str, given: str, meant: str) -> None:
    with pytest.raises(InvalidValue, match=field) as caught:
        DeploymentConfig.parse({"model": "m", field: given})
    assert caught.value.hint == f"Did you mean {meant!r}?"


def test_numbers_of_numpy_are_taken_as_pythons_own() -> None:
    given = {
        "max_new_tokens": np.int64(5),
        "do_sample": np.bool_(True),
        "temperature": np.float32(0.5),
        "eos_token_id": np.array([1, 2]),
        "logit_bias": {np.int64(3): np.float32(1.5)},
        "stop": [np.str_("x")],
    }
    params = parse_generation(given)
    assert params == parse_generation(
        {"max_new_tokens": 5, "do_sample": True, "temperature": 0.5, "eos_token_id": [1, 2]}
        | {"logit_bias": {3: 1.5}, "stop": ["x"]}
    )
    assert GenerationParams.from_json(params.to_json()) == params
    assert DeploymentConfig.parse({"model": "m", "gpus": np.arange(2), "replicas": np.int32(2)}).gpus == [0, 1]


def test_generation_accepts_usual_spellings() -> None:
    params = parse_generation(
        {
            "stop": "\n",
            "do_sample": False,
            "temperature": 1,
            "max_new_tokens": np.int64(5),
            "top_k": None,
            "num_beams": 1,
        }
    )
    assert params == GenerationParams(stop=["\n"], temperature=1.0, max_new_tokens=5)


def test_speculation_is_refused_where_nothing_would_speculate():
    options = {"speculative": "prompt_lookup"}
    assert DeploymentConfig.parse({"model": "m", "options": options}).options.speculative == "prompt_lookup"
    with pytest.raises(InvalidValue, match=r"options\.speculative"):
        DeploymentConfig.parse({"model": "m", "options": options, "engine": "baseline"})


def test_a_step_is_shorter_on_a_cpu_unless_asked_for():
    assert EngineOptions().step_tokens("cuda") > EngineOptions().step_tokens("cpu")
    assert EngineOptions(max_step_tokens=99).step_tokens("cpu") == 99
