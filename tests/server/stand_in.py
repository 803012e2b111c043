"""A child process that does what a test asks (environment variable STAND_IN) instead of serving a model."""

from __future__ import annotations

import json
import os
import signal
import sys
import time


def main() -> None:
    line = json.loads(sys.stdin.readline())
    rank = "rank" in line
    asked = os.environ.get("STAND_IN", "") if rank else ""
    status = os.fdopen(int(os.environ["MIINB_STATUS_FD"]), "w", buffering=1)

    def tell(**words: object) -> None:
        status.write(json.dumps(words) + "\n")

    tell(phase={"name": "load", "done": 1, "total": 2})
    if asked == "hang":
        time.sleep(600)
    if asked == "fail":
        failed = {
            "error": "BrokenCheckpoint",
            "message": "weights.safetensors is damaged.",
            "hint": "",
            "details": "at",
        }
        tell(failed=failed)
        sys.exit(1)
    if asked == "crash":
        print("Traceback: something broke")
        sys.exit(3)
    if asked == "memory":
        print("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
        sys.exit(1)
    if asked == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    in_flight = 0

    def report() -> None:
        replicas = line["config"].get("replicas", 1)
        tell(activity={"in_flight": in_flight, "queued": 0, "requests": in_flight, "replicas": replicas})

    def busier(*_: object) -> None:
        nonlocal in_flight
        in_flight += 1
        report()

    silent_s = -19.0

    def silent(*_: object) -> None:
        nonlocal silent_s
        silent_s += 20.0
        tell(silent={"replica": 0, "seconds": silent_s})

    if asked == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, busier)
    signal.signal(signal.SIGUSR2, silent)
    tell(ready={} if rank else {"address": "unix:" + line["folder"] + "/rpc.sock"})
    if not rank:
        report()
    while True:
        time.sleep(1)
        if not rank:
            report()  # the frontend's sign of life


if __name__ == "__main__":
    main()
