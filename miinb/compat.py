"""MII's own calls, for programs that were written for it: `import miinb as mii`.

`deploy` starts a persistent deployment, `mii_query_handle` asks it from any process of the user, `terminate` ends it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from miinb.constants import DeploymentType, TaskType
from miinb.errors import InvalidValue, TargetError, UnknownOption, did_you_mean
from miinb.offloading import settings_fault
from miinb.queries import MiiReply
from miinb.session import Session, attach

#: `mii_config` keys and the `Session` argument that each becomes.
RENAMED = {
    "tensor_parallel": "tensor_parallel",
    "dtype": "dtype",
    "replica_num": "replicas",
    "deploy_rank": "gpus",
    "max_tokens": "max_length",
    "trust_remote_code": "trust_remote_code",
    "port_number": "port",
}

#: Keys that are honored in a way of their own (`_special`).
SPECIAL = ("enable_cuda_graph", "replace_with_kernel_inject", "hf_auth_token", "enable_restful_api")

#: Keys that ask for nothing here, and why.
ACCEPTED = {
    "profile_model_time": "the model's time is always measured",
    "skip_model_check": "no listing of the hub is fetched",
    "load_with_sys_mem": "weights are read from the file straight to the device",
    "meta_tensor": "no full copy of the model is ever made",
    "torch_dist_port": "ranks meet through a file",
}

#: Keys that cannot be honored, and what to do.
REFUSED = {
    "checkpoint_dict": "Give the checkpoint's folder as model.",
    "hostfile": "One machine is served; name its GPUs with deploy_rank.",
    "restful_api_port": "The HTTP API is not there yet; use gRPC (port_number).",
    "replica_configs": "Use replica_num and deploy_rank.",
    "pipeline_kwargs": "Use trust_remote_code and hf_auth_token, or miinb.Session's arguments.",
}

#: MII's spellings of a dtype (a `torch.dtype` prints as the ones with a dot).
DTYPES = {
    **dict.fromkeys(("fp32", "float32", "float", "torch.float32"), "fp32"),
    **dict.fromkeys(("fp16", "float16", "half", "torch.float16"), "fp16"),
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16"), "bf16"),
    **dict.fromkeys(("int8", "torch.int8"), "int8"),
    "auto": "auto",
}

_ours: dict[str, Session] = {}  # NON_PERSISTENT deployments of this process: the reference keeps them alive


def deploy(
    task: str | TaskType,
    model: str,
    deployment_name: str,
    deployment_type: DeploymentType | str = DeploymentType.LOCAL,
    model_path: str | None = None,
    enable_deepspeed: bool = True,
    enable_zero: bool = False,
    ds_config: Mapping[str, Any] | str | None = None,
    mii_config: Mapping[str, Any] | None = None,
    version: int = 1,
) -> None:
    """Start a persistent deployment, as MII's function of that name.

    Args:
        task: Hugging Face's name or a `TaskType`.
        model: hub name in the local cache, or a folder.
        deployment_name: for `mii_query_handle` and `terminate`.
        deployment_type: LOCAL, or NON_PERSISTENT (ends with this process); AML is not there yet.
        model_path: MII's cache folder; refused with what to use instead.
        enable_deepspeed: False serves plain transformers (`engine="baseline"`).
        enable_zero: ZeRO-Inference: weights wait in the host's memory or on a disk (needs enable_deepspeed=False).
        ds_config: DeepSpeed's configuration of it, or a JSON file with it; None: weights in the host's memory.
        mii_config: MII's options; unknown ones are refused with the near name.
        version: of an Azure ML deployment.

    Raises:
        ConfigError: an option is unknown, wrong, or not there yet; nothing was started.
        TargetError: `DeploymentType.AML`.
        DeploymentExists: the name is taken.
        ModelError, StartError: as `Session`.
    """
    where = _deployment_type(deployment_type)
    _refuse(model_path, enable_deepspeed, enable_zero, ds_config, version)
    options = session_options(dict(mii_config or {}))
    if not enable_deepspeed:
        options["engine"] = "baseline"
    if enable_zero:
        options |= _zero(ds_config, options)
    persist = where is DeploymentType.LOCAL
    with _token(options.pop("hf_auth_token", None)):
        session = Session(model, str(task), name=deployment_name, persist=persist, **options)
    if not persist:
        _ours[deployment_name] = session


def mii_query_handle(deployment_name: str) -> QueryHandle:
    """A handle of the running deployment of that name, started by this process or another.

    Raises:
        DeploymentNotFound: there is none; the near name is in the hint.
    """
    return QueryHandle(_ours.get(deployment_name) or attach(deployment_name))


def terminate(deployment_name: str) -> None:
    """End the deployment of that name; returns when its processes are gone.

    Raises:
        DeploymentNotFound: there is none; the near name is in the hint.
    """
    (_ours.pop(deployment_name, None) or attach(deployment_name)).stop()


class QueryHandle:
    """What `mii_query_handle` returns. Its sessions live in the server: every handle of a deployment shares them."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def query(self, request_dict: Mapping[str, Any], **query_kwargs: Any) -> MiiReply:
        """Ask the model: the request's keys by task ("query": a prompt or a list), all else are generation parameters.

        With `session_id` what was said before in that session goes before the prompt (or is the conversation's
        beginning). A turn that fails or is interrupted leaves the session as it was.

        Returns:
            A reply: `response` (a list: prompt and new text of each), `time_taken` and `model_time_taken` (seconds); of
            the task conversational `conversation_id`, `past_user_inputs`, `generated_responses`, and the times.

        Raises:
            RequestError: a key or parameter is wrong (the message names it), or the request failed.
        """
        return self._session.query(request_dict, **query_kwargs)

    def create_session(self, session_id: str) -> None:
        """Begin a session.

        Raises:
            InvalidRequest: it exists already, or the task does not generate text.
            QueueFull: too many are open.
        """
        self._session.create_session(session_id)

    def destroy_session(self, session_id: str) -> None:
        """Forget a session.

        Raises:
            InvalidRequest: there is none of that name.
        """
        self._session.destroy_session(session_id)

    def terminate(self) -> None:
        """End the deployment."""
        _ours.pop(self._session.name, None)
        self._session.stop()


def session_options(config: dict[str, Any]) -> dict[str, Any]:
    """`Session` arguments of an `mii_config`.

    Raises:
        UnknownOption, InvalidValue: a key or value that cannot be honored; the hint says what to do.
    """
    known = (*RENAMED, *SPECIAL, *ACCEPTED, *REFUSED)
    for key, value in config.items():
        if key not in known:
            raise UnknownOption(f"mii_config: there is no option {key!r}.", hint=did_you_mean(key, known))
        if key in REFUSED and value is not None:
            raise InvalidValue(f"mii_config: {key} cannot be used.", hint=REFUSED[key])
    options = {RENAMED[key]: value for key, value in config.items() if key in RENAMED and value is not None}
    if "dtype" in options:
        options["dtype"] = _dtype(options["dtype"])
    if "gpus" in options:
        ranks = options["gpus"]
        options["gpus"] = [ranks] if isinstance(ranks, int) else ranks
        if ranks == -1:  # MII's "choose"
            del options["gpus"]
    return options | _special(config)


def _special(config: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if config.get("enable_cuda_graph") is not None:
        options["options"] = {"cuda_graphs": bool(config["enable_cuda_graph"])}
    if config.get("replace_with_kernel_inject") is False:
        options["engine"] = "baseline"
    if config.get("enable_restful_api"):
        raise InvalidValue("mii_config: enable_restful_api is not there yet.", hint="Use gRPC (port_number).")
    if config.get("hf_auth_token"):
        options["hf_auth_token"] = config["hf_auth_token"]
    return options


def _dtype(value: object) -> str:
    name = DTYPES.get(str(value))
    if name is None:
        raise InvalidValue(f"mii_config: dtype cannot be {value!r}.", hint=did_you_mean(str(value), DTYPES))
    return name


def _deployment_type(value: DeploymentType | str) -> DeploymentType:
    try:
        where = DeploymentType(value)
    except ValueError:
        raise InvalidValue(
            f"deployment_type: there is no {value!r}.", hint=did_you_mean(str(value), DeploymentType)
        ) from None
    if where is DeploymentType.AML:
        raise TargetError("Deploying to Azure ML is not there yet.", hint="Use DeploymentType.LOCAL meanwhile.")
    return where


def _refuse(
    model_path: str | None,
    enable_deepspeed: bool,
    enable_zero: bool,
    ds_config: Mapping[str, Any] | str | None,
    version: int,
) -> None:
    """Refuse what cannot be honored, rather than drop it."""
    if enable_zero and enable_deepspeed:
        raise InvalidValue(
            "enable_zero: not together with enable_deepspeed, select only one.", hint="Set enable_deepspeed=False."
        )
    if ds_config is not None and not enable_zero:
        raise InvalidValue("ds_config: acts only with enable_zero=True.")
    if model_path is not None:
        raise InvalidValue(
            "model_path: was MII's cache folder.", hint="Set HF_HUB_CACHE, or give the model's folder as model."
        )
    if version != 1:
        raise InvalidValue("version: only Azure ML deployments have one.")


def _zero(ds_config: Mapping[str, Any] | str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """`Session` arguments of ZeRO-Inference as MII has it: the dtype is what `ds_config` enables, else fp32."""
    settings = _ds_config(ds_config)
    enabled = [name for name in ("fp16", "bf16") if (settings.get(name) or {}).get("enabled")]
    dtype = enabled[0] if enabled else "fp32"
    if options.get("dtype", dtype) != dtype:
        raise InvalidValue(
            f"MII Config Error: MII dtype and ZeRO dtype must match: {options['dtype']} and {dtype}.",
            hint="Enable fp16 or bf16 in ds_config, or leave mii_config's dtype out.",
        )
    place = (settings.get("zero_optimization") or {}).get("offload_param") or {}
    where = place.get("device", "cpu")
    more = {"offload": "cpu" if where == "none" else where, "offload_folder": place.get("nvme_path")}
    engine = options.get("options", {}) | more | {"ds_config": settings or None}
    return {"dtype": dtype, "options": engine}


def _ds_config(ds_config: Mapping[str, Any] | str | None) -> dict[str, Any]:
    found: Any = {} if ds_config is None else ds_config
    if isinstance(ds_config, (str, os.PathLike)):
        try:
            found = json.loads(Path(ds_config).read_bytes())
        except (OSError, ValueError) as error:
            raise InvalidValue(f"ds_config: {ds_config} is no file of JSON ({error}).") from error
        if not isinstance(found, dict):
            raise InvalidValue(f"ds_config: {ds_config} holds no JSON object.")
    if fault := settings_fault(found):
        raise InvalidValue(f"ds_config: {fault}.", hint="It is DeepSpeed's configuration of ZeRO stage 3, or its file.")
    return dict(found)


@contextmanager
def _token(token: str | None) -> Iterator[None]:
    """Lend a hub token to the processes that are started inside: by environment, never by file or command line."""
    before = os.environ.get("HF_TOKEN")
    if token:
        os.environ["HF_TOKEN"] = token
    try:
        yield
    finally:
        if token and before is None:
            del os.environ["HF_TOKEN"]
        elif token and before is not None:
            os.environ["HF_TOKEN"] = before
