"""How the children of a deployment are started: their JSON lines, environments, ports and devices."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time
import uuid
from pathlib import Path

from miinb.config import DeploymentConfig
from miinb.registry import INSTANCE_VARIABLE, remove_segments
from miinb.server.owner import Order
from miinb.server.process import Process
from miinb.spinning import openmp_waiting

FRONTEND = "miinb.server.frontend"
WORKER = "miinb.server.worker"

#: Of the frontend, which copies megabytes of pictures: glibc gives such blocks back at once, and each comes anew, page
#: by page. These keep them instead (1 to 5 ms of a picture). What the user has set holds.
_KEEPING_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}


class Launch:
    """Makes the processes of one deployment.

    Attributes:
        instance_id: a fresh one for every start; tells this deployment from an earlier one of its name.
        ports: one a replica, free at this moment: the name of its group's rendezvous and shared memory.
    """

    def __init__(self, order: Order, config: DeploymentConfig) -> None:
        self.config = config
        self.folder = folder = Path(order.folder)
        self.instance_id = uuid.uuid4().hex
        self.ports = free_ports(config.replicas)
        self._modules = {"frontend": FRONTEND, "worker": WORKER, **order.modules}
        self._line = {"config": config.model_dump(mode="json"), "folder": str(folder), "name": order.name}
        self._plan = order.plan
        if config.port is not None:
            _write_token(folder / "token")

    def frontend(self) -> Process:
        """Start the frontend."""
        return Process(
            "The frontend",
            self._modules["frontend"],
            self._line,
            log=self.folder / "logs" / "frontend.log",
            env={**_KEEPING_MEMORY, **self._environment(), "CUDA_VISIBLE_DEVICES": ""},
        )

    def rank(self, replica: int, rank: int) -> Process:
        """Start one rank of a replica."""
        own = {"replica": replica, "rank": rank, "gpus": self._gpus(replica), "t_start": time.monotonic()}
        line = {**self._line, **own, "plan": self._plan}
        return Process(
            f"Rank {rank} of replica {replica}",
            self._modules["worker"],
            {**line, "port": self.ports[replica]},
            log=self.folder / "logs" / f"rank-{replica}-{rank}.log",
            env={**self._environment(), **self._rank_environment(replica)},
            replica=replica,
            rank=rank,
        )

    def fresh_rendezvous(self, replica: int) -> None:
        """What is left of an earlier start would let the new ranks meet dead ones."""
        for name in (f"rdzv-{replica}", f"ranks-{replica}.sock"):
            (self.folder / name).unlink(missing_ok=True)
        remove_segments((self.ports[replica],))

    def gpu(self, replica: int, rank: int) -> int | None:
        """The GPU of a rank as the user numbers them, None on a CPU."""
        gpus = self._gpus(replica)
        return gpus[rank] if gpus else None

    def _gpus(self, replica: int) -> list[int]:
        """The replica's GPUs, numbered within CUDA_VISIBLE_DEVICES; [] on a CPU."""
        named = self.config.gpus
        if self.config.device == "cpu" or not named:
            return []
        ranks = self.config.tensor_parallel
        flat = [gpu for part in named for gpu in (part if isinstance(part, list) else [part])]
        return flat[replica * ranks : (replica + 1) * ranks]

    def _environment(self) -> dict[str, str]:
        """What all children get. The interpreter's folder comes first in PATH: DeepSpeed looks for ninja there."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", INSTANCE_VARIABLE: self.instance_id}

    def _rank_environment(self, replica: int) -> dict[str, str]:
        cores = len(os.sched_getaffinity(0))
        ranks = self.config.replicas * self.config.tensor_parallel
        threads = self.config.options.threads or max(1, cores // ranks)
        return {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": visible_devices(self._gpus(replica)),
            "OMP_NUM_THREADS": str(threads),
            **openmp_waiting(crowded=ranks * threads > cores),
        }


def visible_devices(gpus: list[int]) -> str:
    """CUDA_VISIBLE_DEVICES of a rank: the GPUs meant by these numbers within this process's own list."""
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in inherited.split(",")] if inherited else None
    return ",".join(names[gpu] if names else str(gpu) for gpu in gpus)


def free_ports(count: int) -> list[int]:
    """TCP ports of the loopback interface that are free now, all different."""
    sockets: list[socket.socket] = []
    try:
        for _ in range(count):
            probe = socket.socket()
            sockets.append(probe)
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


def _write_token(path: Path) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "w", encoding="ascii") as stream:
        stream.write(secrets.token_urlsafe(32))
