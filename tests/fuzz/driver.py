"""Draws in worker processes: a draw that crashes or hangs takes its worker with it, and the run goes on."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import psutil

from tests.fuzz import box

LIMIT = 30.0  # seconds of processor time a draw may take: a machine that does other things too proves no hang
START = 240.0  # the same for a worker that starts and prepares
IDLE = 0.02  # of the time that goes by: a draw that takes no more of a processor waits for something that never comes
DATA = 12 * 2**30  # bytes that a worker may allocate: what asks for more is refused by the system, and seen


@dataclass
class Tally:
    """What the draws of one kind gave."""

    kind: str
    words: Counter[str] = field(default_factory=Counter)
    faults: dict[int, str] = field(default_factory=dict)  # by seed
    seconds: float = 0.0  # of all draws together

    @property
    def draws(self) -> int:
        return self.words.total()

    def add(self, seed: int, result: box.Result, seconds: float) -> None:
        self.words[result.word] += 1
        self.seconds += seconds
        if result.fault:
            self.faults[seed] = result.fault


class Worker:
    """A process that makes draws of one kind, one at a time; it can be started again."""

    def __init__(self, kind: str, root: Path, limit: float) -> None:
        self.kind, self.root, self.limit = kind, root, limit
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.kind, self.root, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.dead = False
        self.seed: int | None = None
        self.begin(START)

    def begin(self, allowed: float) -> None:
        self.since, self.used, self.allowed = time.monotonic(), self.processor_seconds(), allowed

    def give(self, seed: int) -> None:
        self.seed = seed
        self.begin(self.limit)
        self.pipe.send(seed)

    def processor_seconds(self) -> float:
        """What the process has used of processors so far."""
        try:
            used = psutil.Process(self.process.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return used.user + used.system

    def answer(self) -> box.Result | None:
        """What came back: ``ready`` after the start, a draw's result, or how the worker died; None: still at work."""
        if self.pipe.poll():
            try:
                return self.pipe.recv()
            except EOFError:
                self.process.join(5)
                return self.died(f"the process died: {_how(self.process.exitcode or 0)}")
        passed, used = time.monotonic() - self.since, self.processor_seconds() - self.used
        if used < self.allowed and (passed < self.allowed or used > IDLE * passed):
            return None
        return self.died(f"it hangs: no end after {used:.0f} s of processor time, {passed:.0f} s in all")

    def died(self, how: str) -> box.Result:
        self.dead = True
        return box.Result("fault", how)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _how(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def run(
    kind: str, seeds: Iterator[int], jobs: int = 2, limit: float = LIMIT, said: Callable[[Tally], Any] = id
) -> Tally:
    """The draws of ``kind`` with ``seeds``; ``said`` hears the tally after each."""
    tally, workers = Tally(kind), []
    with tempfile.TemporaryDirectory(prefix="splitfx-fuzz-") as root:
        try:
            workers = [Worker(kind, Path(root), limit) for _ in range(jobs)]
            while workers:
                wait([w.pipe for w in workers], timeout=0.5)
                workers = [w for w in workers if _goes_on(w, seeds, tally, said)]
        finally:
            for worker in workers:
                worker.stop()
    return tally


def _goes_on(worker: Worker, seeds: Iterator[int], tally: Tally, said: Callable[[Tally], Any]) -> bool:
    """Take a worker's answer, if it has one, and give it the next seed; False when there is none left."""
    result = worker.answer()
    if result is None:
        return True
    if worker.seed is not None:
        tally.add(worker.seed, result, time.monotonic() - worker.since)
        said(tally)
    elif result.fault:
        raise RuntimeError(f"a worker of kind {tally.kind} does not start: {result.fault}")
    if worker.dead:
        worker.stop()
        worker.start()
        return True
    if (seed := next(seeds, None)) is None:
        worker.stop()
        return False
    worker.give(seed)
    return True


def _serve(kind: str, root: Path, pipe: Any) -> None:
    """A worker's life: a seed comes, a result goes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_DATA, (DATA, DATA))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - what splitfx prints to users; for ever
    box.prepare(kind)
    pipe.send(box.Result("ready"))
    while True:
        try:
            seed = pipe.recv()
        except EOFError:
            return
        pipe.send(box.run_draw(kind, seed, root))
