"""`Session`: the handle of one deployment in a notebook or a script; `attach`."""

from __future__ import annotations

import contextlib
import json
import os
import weakref
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # else every `!command` of a cell prints a warning of gRPC

from miinb import cell, queries, registry
from miinb.asking import Messages
from miinb.client import Client
from miinb.config import DeploymentConfig
from miinb.deployment import Deployment
from miinb.errors import DeploymentExists, InvalidRequest, MiinbError, OutOfMemory, StartError
from miinb.messages import Chunk, EngineInfo, Plan, Status
from miinb.preparation import Preparation, prepare
from miinb.request_log import RequestLog
from miinb.seconds import drain_limit
from miinb.tasks import TASKS

if TYPE_CHECKING:
    import pandas

    from miinb.bench.records import Runs
    from miinb.predictions import Predictions
    from miinb.queries import MiiReply
    from miinb.results import Result
    from miinb.streams import Stream

_NAME_TRIES = 5

#: This process's sessions by instance id: joining a deployment twice gives one session with all its records.
_sessions: weakref.WeakValueDictionary[str, Session] = weakref.WeakValueDictionary()


class Session:
    """A deployment of one model: starts it (or joins it, see `attach`), asks it, ends it.

    Args:
        model: folder (safetensors, GGUF), .gguf file, or hub name in the local cache.
        task: Hugging Face's task name; inferred when the model leaves one choice.
        name: of the deployment; default from the model, made unique.
        engine: "optimized", or "baseline" (plain transformers).
        dtype: "auto" is the checkpoint's (fp16 becomes bf16 or fp32 on a CPU).
        device: "auto", "cuda" or "cpu".
        gpus: GPUs to use, one list a replica if nested; numbered within CUDA_VISIBLE_DEVICES.
        tensor_parallel: GPUs of one replica.
        replicas: copies of the model.
        max_length: most tokens of one sequence, prompt and answer.
        max_batch: most sequences at once.
        kv_dtype: of the KV cache: "auto" is `dtype`; "fp8" takes about half of bf16's memory, and answers can
            differ (the optimized engine's alone; of GPUs Ada, Hopper and later).
        load_format: "dummy" makes random weights from config.json.
        revision: of a hub name.
        trust_remote_code: allow Python code from the model's folder.
        persist: live on when this process ends, until idle for `idle_timeout_s`.
        idle_timeout_s: idle limit of a persistent deployment, seconds.
        start_timeout_s: time limit of the start, seconds.
        options: engine options (`miinb.config.EngineOptions`).

    Raises:
        ConfigError: an option is unknown or wrong; nothing was started.
        ModelError: the model cannot be used as asked.
        StartError: it did not start; the message has the cause, `details` the log's tail.
        DeploymentExists: the name is taken.
    """

    def __init__(
        self,
        model: str | Path,
        task: str | None = None,
        *,
        name: str | None = None,
        engine: str = "optimized",
        dtype: str = "auto",
        device: str = "auto",
        gpus: Sequence[int] | Sequence[Sequence[int]] | None = None,
        tensor_parallel: int = 1,
        replicas: int = 1,
        max_length: int | None = None,
        max_batch: int | None = None,
        kv_dtype: str = "auto",
        load_format: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        persist: bool = False,
        idle_timeout_s: float = 1800.0,
        start_timeout_s: float = 600.0,
        options: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        values = {**locals(), **more}
        for word in ("self", "more", "__class__"):
            values.pop(word, None)
        self._log = RequestLog()
        self._begin(prepare(DeploymentConfig.parse(values)))

    @classmethod
    def _of(cls, deployment: Deployment) -> Self:
        """A session that joins a running deployment."""
        self = cls.__new__(cls)
        self._log, self._config = RequestLog(), DeploymentConfig.from_json(json.dumps(deployment.entry.config))
        self._task = self._config.task or ""
        self._connect(deployment)
        return self

    def _begin(self, prepared: Preparation) -> None:
        self._config = prepared.config
        self._task = prepared.task
        self._connect(self._start(prepared))

    def _start(self, prepared: Preparation) -> Deployment:
        wanted = self._config.name or registry.default_name(self._config.model)
        for attempt in range(_NAME_TRIES):
            name = self._config.name or registry.unique_name(wanted)
            try:
                with cell.progress(name) as on_phase:
                    return Deployment.start(
                        prepared.resolved, name=name, task=prepared.task, plan=prepared.plan, on_phase=on_phase
                    )
            except DeploymentExists:  # another process took the free name first
                if self._config.name or attempt == _NAME_TRIES - 1:
                    raise
            except OSError as error:  # a full disk, say
                raise StartError(f"It could not be started: {error}.") from error
        raise DeploymentExists(f"No free name near {wanted!r}.")

    def _connect(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._client = Client(deployment.entry.address, log=self._log)
        self._info: EngineInfo | None = None
        _sessions[deployment.entry.instance_id] = self

    # What it is

    @property
    def name(self) -> str:
        """The deployment's name."""
        return self._deployment.entry.name

    @property
    def model(self) -> str:
        """The model's folder or hub name."""
        return self._config.model

    @property
    def task(self) -> str:
        """Hugging Face's name of the task."""
        self._task = self._task or self._describe().task
        return self._task

    @property
    def engine(self) -> str:
        """The engine that really runs: "baseline" where the plan fell back, whatever `config.engine` asked for.

        Once the deployment has ended, the one that ran, or (never asked while it lived) the one that was asked for.
        """
        try:
            return self._describe().engine
        except MiinbError:
            return self._config.engine

    @property
    def state(self) -> str:
        """starting, ready, draining, stopped, failed or lost, at this moment."""
        return self.status().state

    @property
    def address(self) -> str:
        """gRPC address of the frontend."""
        return self._deployment.entry.address

    @property
    def pid(self) -> int:
        """Process id of the supervisor."""
        return self._deployment.entry.pid

    @property
    def config(self) -> DeploymentConfig:
        """The configuration that was asked for (of a joined deployment: what it runs with)."""
        return self._config

    @property
    def instance_id(self) -> str:
        """Tells this deployment from earlier and later ones of its name."""
        return self._deployment.entry.instance_id

    @property
    def load_s(self) -> float:
        """Seconds that rank 0 took to load the model."""
        return self._describe().load_s

    @property
    def persist(self) -> bool:
        """Whether it lives on when the process that started it ends."""
        return self._deployment.entry.persist

    @property
    def records(self) -> pandas.DataFrame:
        """One row for each request of this session, through its restarts."""
        return self._log.frame

    # Asking the model

    def generate(self, prompts: str | Sequence[str], **parameters: Any) -> Result:
        """New text for a prompt or a list of prompts, in order; of text-to-image pictures (an `ImageResult`).

        Args:
            prompts: one prompt or several.
            parameters: `GenerationParams`; of pictures `ImageParams`, `image`, `mask_image`, `on_progress`; `timeout_s`

        Raises:
            RequestError: the request was refused or failed.
        """
        if self._makes_images():
            with cell.steps("generate") as bar:
                return self._client.generate_images(prompts, parameters.pop("on_progress", None) or bar, **parameters)
        return self._client.generate(prompts, **parameters)

    def chat(self, messages: Messages, **parameters: Any) -> Result:
        """The model's answer to a conversation ({"role": ..., "content": ...}) or a text, through its chat template.

        Roles are system, user and assistant; the last message is the user's. Of a conversation that has outgrown the
        context the oldest turns are left out: `Result.dropped_messages` says how many messages.
        """
        return self._client.chat(messages, **parameters)

    def predict(self, inputs: Any, **options: Any) -> Predictions:
        """Predictions of an encoder task, one list for each input, in order; `.frame` has them as a table.

        Args:
            inputs: a text, a dictionary of the task's inputs ({"question": ..., "context": ...}), or any number of
                them: a list, tuple, generator, pandas Series or numpy array.
            options: the task's own (`top_k`, ...); `timeout_s` limits the whole request.

        Raises:
            RequestError: the request was refused or failed; the message says which input's (`inputs[1500]`).
            Interrupted: the Stop button was pressed.
        """
        with cell.counting("predict") as advance:
            return self._client.predict(inputs, advance, **options)

    def stream(self, prompt: str | Sequence[Mapping[str, str]], **parameters: Any) -> Stream:
        """Chunks of the answer to a prompt or a conversation; `.cancel()` ends it, `.result` holds the whole."""
        stream = self._client.stream(prompt, **parameters)
        cell.end_with_cell(stream)
        return stream

    def query(self, request: Mapping[str, Any], **parameters: Any) -> MiiReply:
        """MII's call: a request dictionary in, MII's reply fields out."""
        return queries.query(self._client, request, parameters)

    def create_session(self, session_id: str) -> None:
        """Begin a conversation that the server remembers; `session_id=` of any request that generates goes on with it.

        Raises:
            InvalidRequest: it exists already, or the task does not generate text.
            QueueFull: too many are open.
        """
        if not TASKS[self.task].streams:
            raise InvalidRequest(f"session_id: only for tasks that generate text, not {self.task}.")
        self._client.create_session(session_id)

    def destroy_session(self, session_id: str) -> None:
        """Forget a conversation. Raises InvalidRequest where there is none of that id."""
        self._client.destroy_session(session_id)

    def agenerate(self, prompts: str | Sequence[str], **parameters: Any) -> Awaitable[Result]:
        """`generate`, awaitable; `on_progress` is called in another thread."""
        if self._makes_images():
            return self._client.agenerate_images(prompts, **parameters)
        return self._client.agenerate(prompts, **parameters)

    def achat(self, messages: Messages, **parameters: Any) -> Awaitable[Result]:
        """`chat`, awaitable."""
        return self._client.achat(messages, **parameters)

    def apredict(self, inputs: Any, **options: Any) -> Awaitable[Predictions]:
        """`predict`, awaitable."""
        return self._client.apredict(inputs, **options)

    def astream(self, prompt: str | Sequence[Mapping[str, str]], **parameters: Any) -> AsyncIterator[Chunk]:
        """`stream` as an asynchronous iterator."""
        return self._client.astream(prompt, **parameters)

    # Measuring and showing

    def bench(self, workload: Any = None, **fields: Any) -> Runs:
        """Measure it under a workload (`miinb.config.BenchConfig`'s fields): `Runs`."""
        from miinb.bench.runner import bench

        return bench(self, workload, **fields)

    def panel(self, kind: str | None = None) -> Any:
        """A widget to try the model with; `kind` None chooses by the task."""
        from miinb.notebook.panels import panel

        return panel(self, kind)

    # Its life

    def status(self) -> Status:
        """The deployment at this moment."""
        return self._deployment.status()

    def plan(self) -> Plan:
        """Which optimizations run and why: what was chosen before the start, then what the rank found."""
        return self._describe().plan

    def logs(self, n: int = 50, rank: int | None = None) -> str:
        """The last `n` lines of each log, or of one rank's."""
        return self._deployment.logs(n, rank)

    def stop(self, *, drain_s: float = 0.0) -> Status | None:
        """End the deployment; returns when every process is gone and the GPU memory is back.

        `drain_s`: seconds for the requests in flight; no new ones are taken. Raises MiinbError where something is left.
        """
        limit_s = drain_limit(drain_s)
        if self._deployment.stopped:
            return None
        try:
            if limit_s == 0:
                self._client.close()
            last = self._deployment.stop(drain_s=limit_s)
        except BaseException:
            if limit_s == 0 and not self._deployment.ending:  # the Stop button came before the order: it lives on
                self._connect(self._deployment)
            raise
        self._client.close(drained=True)
        return last

    def restart(self, *, rolling: bool = False, drain_s: float = 10.0) -> Self:
        """End it and start it again with the same configuration and name; what a start would refuse is refused first.

        `rolling`: one replica after another while the others serve. `drain_s`: seconds for the requests in flight.
        Raises ConfigError or ModelError where it cannot (it still runs), StartError where it has ended.
        """
        limit_s = drain_limit(drain_s)
        config = self._config.model_copy(update={"name": self.name, "persist": self.persist or self.status().persist})
        with contextlib.suppress(OutOfMemory):  # what this deployment holds is free only when it has ended
            prepare(config)
        if rolling:
            self._deployment.roll(drain_s=limit_s)
            return self
        self.stop(drain_s=limit_s)
        try:
            self._begin(prepare(config))
        except MiinbError as error:
            if not isinstance(error, DeploymentExists):  # by another process: it is to be joined, not started
                error.hint = f"{error.hint} {self.name} has ended; restart() tries to start it once more.".strip()
            self._client.close(because=error, drained=True)
            raise
        return self

    def keep(self) -> None:
        """Make it persistent: it lives on when this process ends, until it is idle for `idle_timeout_s`."""
        self._deployment.keep()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"Session({self.name!r}, model={self.model!r}, engine={self.engine!r}, state={self.state!r})"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from miinb.notebook.cards import bundle, session_card

        return bundle(session_card(self))

    def _makes_images(self) -> bool:
        return self.task in TASKS and TASKS[self.task].image

    def _describe(self) -> EngineInfo:
        if self._info is None:
            self._info = self._client.describe()
        return self._info


def attach(name: str) -> Session:
    """A session of the running deployment of that name: this process's own if it has one, so that records are shared.

    A deployment of another process does not end with this one.

    Raises:
        DeploymentNotFound: there is none; the near name is in the hint.
        VersionMismatch: another version of miinb started it.
    """
    deployment = Deployment.join(name)
    own = _sessions.get(deployment.entry.instance_id)
    return own if own is not None and not own._deployment.stopped else Session._of(deployment)
