"""Drives sessions with a workload and records every request: equal work, alternating arms, compared outputs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from miinb import cell
from miinb.bench import arms as arms_of
from miinb.bench.arms import Arm
from miinb.bench.callbacks import harmless
from miinb.bench.checks import Answered, compare_outputs
from miinb.bench.environment import environment
from miinb.bench.gone import Gone
from miinb.bench.kinds import Kind, kind_of
from miinb.bench.objectives import met
from miinb.bench.records import Record, Runs, new_run_id, utc_now
from miinb.bench.summary import failure_kinds, summarize
from miinb.bench.sweeping import Sweep
from miinb.bench.turns import Turn, turns
from miinb.bench.workload import Endless, Job, Point, configure, point_at, points
from miinb.errors import Cancelled, DeadlineExceeded, MiinbError

if TYPE_CHECKING:
    from miinb.config import BenchConfig

#: Called after each request: done, total (0 where it is not known), its record.
Progress = Callable[[int, int, Record], None]
#: Called after each point (a concurrency or a rate) with the run so far.
OnPoint = Callable[[Runs], object]

JOIN_S = 10.0
#: Most jobs that are made before a block of `duration_s` begins, and most seconds of making them.
MOST_RESERVED = 20_000
RESERVE_S = 5.0


def bench(
    session: Any,
    workload: Any = None,
    *,
    progress: Progress | None = None,
    on_point: OnPoint | None = None,
    stop: threading.Event | None = None,
    **fields: Any,
) -> Runs:
    """Measure one session under a workload.

    Args:
        session: a running `Session`.
        workload: prompts, or a `BenchConfig`; see `miinb.bench.workload.configure`.
        progress: called after each request, by the thread that sent it; None shows a progress bar.
        on_point: called after each concurrency or rate with the run so far, where a request has succeeded.
        stop: ends the run as the Stop button does, once it is set (by another thread).
        fields: fields of `BenchConfig` (concurrency, requests, prompt_tokens, new_tokens, price, ...).

    Returns:
        One run. Stopping it (Ctrl-C, the Stop button) keeps the requests measured so far; `env` then says so.

    Raises:
        UnknownOption, InvalidValue: a field does not exist or has a wrong value.
        MiinbError: every request failed; the first error is in the text.
        Cancelled: `stop` was set before the first request was done.
    """
    return compare([session], workload, progress=progress, on_point=on_point, stop=stop, **fields)


def compare(
    sessions: Sequence[Any] | Mapping[str, Any],
    workload: Any = None,
    *,
    progress: Progress | None = None,
    on_point: OnPoint | None = None,
    stop: threading.Event | None = None,
    **fields: Any,
) -> Runs:
    """Measure several sessions under one workload: same prompts, seeds and lengths, alternating, one at a time.

    The arms are named by their engine ("baseline", "baseline-best", "optimized"), or by the session's name where two
    would be alike. With an arm "baseline" the answers of the others are compared with its own (else with the first
    arm's), unless check="none".

    Args:
        sessions: running sessions, or names of running deployments; a mapping names the arms by its keys.
        workload: as for `bench`.
        progress, on_point, stop: as for `bench`.
        fields: fields of `BenchConfig`.
    """
    config = configure(workload, fields)
    arms = arms_of.label(sessions)
    told, stop = (harmless(progress, "progress"), harmless(on_point, "on_point")), stop or threading.Event()
    kind = kind_of(config, arms, stop)
    run = _Run(kind.config, arms, kind, *told, stop)
    try:
        run.measure()
    except KeyboardInterrupt:
        if not run.measured:
            raise  # nothing to keep
        run.interrupted = True
    except Cancelled:  # as requests were being made
        if not run.stop.is_set():
            raise
    if run.stop.is_set() and not run.measured:
        raise Cancelled("The benchmark was stopped before its first request was done.")
    run.interrupted |= run.stop.is_set() and (not run.total or len(run.records) < run.total)
    return run.result()


@dataclass
class _Run:
    config: BenchConfig
    arms: list[Arm]
    kind: Kind
    progress: Progress | None
    on_point: OnPoint | None
    stop: threading.Event
    run_id: str = field(default_factory=new_run_id)
    created: str = field(default_factory=utc_now)
    interrupted: bool = False
    records: list[Record] = field(default_factory=list)
    answers: dict[int, Answered] = field(default_factory=dict)  # by seq, of the point that runs
    t_start: float = field(default_factory=time.perf_counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    total: int = 0  # 0: not known (a sweep, or a closed loop by the clock)
    sweep: Sweep | None = None
    gone: Gone = field(default_factory=Gone)

    @property
    def measured(self) -> bool:
        """Whether a request has ended that is no warm-up."""
        return not all(record.warmup for record in self.records)

    @property
    def _there(self) -> list[Arm]:
        """The arms that are not gone."""
        return [arm for arm in self.arms if arm.label not in self.gone.arms]

    def measure(self) -> None:
        """All points: warm-up of each arm, then its blocks, the arms taking turns (A B, B A, ...)."""
        plan = self._points()
        bar = None if self.progress else cell.bar(total=self.total or None, desc="bench", unit="request", leave=False)
        if bar is not None:
            self.progress = lambda done, total, record: bar.update()
        try:
            for point in plan:
                for turn in turns(point, self.arms):
                    if self.stop.is_set():
                        return
                    if turn.arm.label not in self.gone.arms:
                        self._block(turn)
                for arm in self._there:
                    arm.note_memory()
                self._compare()
                self._note_load(point)
                if self.on_point is not None and any(self._counts(record) for record in self.records):
                    self.on_point(self.result())
                if not self._there:
                    return
        finally:
            if bar is not None:
                bar.close()

    def _compare(self) -> None:
        """Compare the answers that came since the last point; they are then dropped."""
        if self.config.check != "none" and not self.config.do_sample and len(self.arms) > 1:
            compare_outputs(self.records, self.answers, exact=self.config.check == "exact")
        self.kind.settle(self.records, self.answers)
        self.answers.clear()

    def _points(self) -> Iterable[Point]:
        """The points that the configuration names, or those of its sweep; sets `total` where it is known."""
        config, sizing = self.config, (self.kind.offsets, self.kind.make, self.stop)
        if config.sweep:
            start = (config.rate or [1.0])[0] if config.sweep == "rate" else float(config.concurrency[0])
            self.sweep = Sweep(config.sweep, start, config.sweep_limit, [arm.label for arm in self.arms])
            loads = enumerate(self.sweep.loads())
            return (point_at(config, index, str(config.sweep), load, *sizing) for index, load in loads)
        plan = points(config, *sizing)
        if config.duration_s is None or config.rate:
            self.total = len(self.arms) * sum(len(p.warmup) + sum(map(len, p.blocks)) for p in plan)
        return plan

    def _note_load(self, point: Point) -> None:
        """Tell the sweep what each arm did at this load."""
        if self.sweep is None:
            return
        rows = summarize(Runs(self._rows(point.index), {self.run_id: {}}).requests)
        for label in self.gone.arms:
            self.sweep.gone(label)
        for arm in self._there:
            row = rows[rows["arm"] == arm.label].iloc[0]
            rate = row["output_tok_s"] if row["output_tok_s"] > 0 else row["req_s"]  # tokens where they are known
            self.sweep.seen(arm.label, point.index, point.load, float(rate), float(row["slo_share"]))

    def _block(self, turn: Turn) -> None:
        """Send the jobs of a block and wait for all of them; an interrupt cancels those in flight."""
        point, jobs = turn.point, turn.jobs
        if isinstance(jobs, Endless):
            jobs.reserve(self._expected(turn), time.perf_counter() + RESERVE_S)
            workers = point.concurrency or 1
        else:
            workers = min((point.concurrency or len(jobs)) if turn.closed else 1024, len(jobs))
        turn.start(time.perf_counter(), self.config.duration_s)
        with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="miinb-bench") as pool:
            futures: list[Future[None]] = [pool.submit(self._worker, turn) for _ in range(workers)]
            try:
                while wait(futures, timeout=0.2).not_done:
                    if self.stop.is_set():
                        turn.ended.set()
                        self.kind.cancel()
            except KeyboardInterrupt:
                self.stop.set()
                turn.ended.set()
                self.kind.cancel()
                wait(futures, timeout=JOIN_S)
                raise
        for future in futures:
            future.result()

    def _expected(self, turn: Turn) -> int:
        """About how many jobs a block of `duration_s` takes, by what the warm-up took; more are made when needed."""
        in_flight = turn.point.concurrency or 1
        mine = [r.e2e_s for r in self.records if r.arm == turn.arm.label and r.point == turn.point.index]
        known = [seconds for seconds in mine if seconds > 0]
        rounds = (self.config.duration_s or 0.0) / float(np.median(known)) if known else 3.0
        return min(int(1.25 * rounds * in_flight) + in_flight, MOST_RESERVED)

    def _worker(self, turn: Turn) -> None:
        """Send jobs until there are none or the time is up; one at least, however late this thread was started."""
        while not (self.stop.is_set() or turn.ended.is_set()):
            with self.lock:
                job = next(turn.queue, None)
            if job is None:
                return
            planned = None if turn.closed else turn.t_block + job.offset_s
            if planned is not None and turn.ended.wait(max(planned - time.perf_counter(), 0.0)):
                return
            record = self._record(turn, job)
            answer = self._send(turn.arm, job, record, planned)
            if self.config.slo and not job.warmup:
                record.slo_met = met(record, self.config.slo)
            with self.lock:
                record.seq = len(self.records)
                self.records.append(record)
                if answer is not None:
                    self.answers[record.seq] = answer
                if self.gone.seen(record):
                    turn.ended.set()
                done = len(self.records)
                if self.progress is not None:
                    self.progress(done, self.total, record)
            if time.perf_counter() >= turn.ends_at:
                return

    def _record(self, turn: Turn, job: Job) -> Record:
        point = turn.point
        return Record(
            run_id=self.run_id,
            seq=-1,
            arm=turn.arm.label,
            **turn.arm.columns,
            concurrency=float("nan") if point.concurrency is None else point.concurrency,
            rate_rps=float("nan") if point.rate is None else point.rate,
            point=point.index,
            block=turn.number,
            pass_no=turn.pass_no,
            prompt_id=job.prompt_id,
            seed=job.seed,
            warmup=job.warmup,
        )

    def _send(self, arm: Arm, job: Job, record: Record, planned: float | None) -> Answered | None:
        """One request, its measures (or its error) into `record`."""
        record.t_submit = utc_now()
        self.kind.note(record, job)  # before the clock starts
        t_submit = planned if planned is not None else time.perf_counter()
        record.t_rel_s = t_submit - self.t_start
        try:
            return self.kind.ask(arm, job, record, t_submit)
        except (MiinbError, KeyboardInterrupt) as failure:
            record.e2e_s = time.perf_counter() - t_submit
            record.status = _status(failure, self.stop.is_set())
            record.error = f"{type(failure).__name__}: {failure}".splitlines()[0]
            return None

    def result(self) -> Runs:
        """The run as frames; compares the outputs and notes what a reader must know."""
        self._compare()
        ok = [r for r in self.records if self._counts(r)]
        failed = [r for r in self.records if r.status in ("error", "timeout")]
        if failed and not ok:
            kinds = failure_kinds(r.error for r in failed)
            raise MiinbError(f"Every request of the benchmark failed ({kinds}).", hint=failed[0].error or "")
        env = {
            "run_id": self.run_id,
            "name": self.config.run,
            "created": self.created,
            "workload": self.config.model_dump(),
            "host": environment(),
            "arms": {arm.label: arm.facts() for arm in self.arms},
            "saturation": self.sweep.saturation if self.sweep else {},
            "interrupted": self.interrupted,
            "done": len(self.records),
            "total": self.total or None,
            "failed": len(failed),
            "gone": list(self.gone.arms),
            **self.kind.facts(),
            "warnings": [*self._warnings(ok), *self.gone.words(len(failed), len(self.records))],
        }
        return Runs(self._rows(), {self.run_id: env})

    def _rows(self, point: int | None = None) -> list[dict[str, Any]]:
        """The records (of one point) as rows."""
        mine = [r for r in self.records if point is None or r.point == point]
        return [{name: getattr(r, name) for name in Record.__slots__} for r in mine]

    @staticmethod
    def _counts(record: Record) -> bool:
        return record.status == "ok" and not record.warmup

    def _warnings(self, ok: Sequence[Record]) -> list[str]:
        found = [text for arm in self.arms for text in arm.warnings]
        if self.interrupted:
            of = f" of {self.total}" if self.total else ""
            found.append(f"interrupted after {len(self.records)}{of} requests")
        return found + self.kind.warnings(self.arms, ok)


def _status(failure: BaseException, stopped: bool) -> Any:
    if stopped or isinstance(failure, KeyboardInterrupt) or type(failure).__name__ == "Cancelled":
        return "cancelled"
    return "timeout" if isinstance(failure, DeadlineExceeded) else "error"
