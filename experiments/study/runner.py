"""Several trainings at once, each in a process of its own; whatever ended is kept at any stop."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from experiments.study.cohorts import Cohort
from experiments.study.plan import Training
from experiments.study.training import checkpoint_of

MARGIN = 1.15
"""A training may take this much longer than the longest of its arm before."""


def serve(pipe: Connection, cohort: Cohort, work: Path, threads: int) -> None:
    """Train what the pipe says until it is closed; ends with the process that began it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    import torch

    from experiments.study.training import train

    torch.set_num_threads(threads)
    while True:
        try:
            training = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("ended", train(training, cohort, work)))
        except Exception:
            pipe.send(("failed", traceback.format_exc()))


KEEP_EVERY = 20.0


@dataclass
class Worker:
    """A process that trains one thing after the other.

    Args:
        process: the process.
        pipe: this side of its pipe.
        training: what it trains now.
        began: since when, ``time.monotonic()``.
    """

    process: BaseProcess
    pipe: Connection
    training: Training | None = None
    began: float = 0.0

    def stop(self) -> None:
        """End the process; what it was training is lost."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


@dataclass
class Runner:
    """Trains a list in order, teachers before their students.

    Args:
        cohort: made already.
        work: folder of the study.
        jobs: processes.
        threads: of each process.
        until: nothing is begun that would not end by then (``time.monotonic()``), and whatever
            runs then is stopped.
        tell: called with a line per event.
        keep: called when trainings have ended, at most every :data:`KEEP_EVERY` seconds.
        durations: seconds of trainings that ended, by (group, arm, part).
    """

    cohort: Cohort
    work: Path
    jobs: int = 1
    threads: int = 1
    until: float = float("inf")
    tell: Callable[[str], None] = print
    keep: Callable[[], None] | None = None
    durations: dict[tuple[str, str, str], float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    workers: list[Worker] = field(default_factory=list)

    def stop(self) -> None:
        """End all processes; what they were training is lost."""
        while self.workers:
            self.workers.pop().stop()

    def speed(self, trainings: Sequence[Training]) -> float:
        """Steps per second of the slowest of some trainings that run at once.

        Args:
            trainings: trials, at most one per process.
        """
        figures = self.run(trainings, set())
        return min((f["speed"] for f in figures), default=0.0)

    def run(self, trainings: Sequence[Training], ended: set[str]) -> list[dict[str, Any]]:
        """Train what has not ended.

        Args:
            trainings: all of the plan, in order.
            ended: names of those that have.

        Returns:
            Figures of what ended now; :attr:`failed` has the others' errors.
        """
        waiting = [
            t for t in trainings if t.name not in ended or self._lacks_weights(t, trainings, ended)
        ]
        done = {t.name for t in trainings} - {t.name for t in waiting}
        figures: list[dict[str, Any]] = []
        kept = time.monotonic()
        while True:
            self._hand_out(waiting, done)
            busy = [w for w in self.workers if w.training is not None]
            if not busy:
                return figures
            left = None if self.until == float("inf") else max(self.until - time.monotonic(), 0)
            ready = wait([w.pipe for w in busy], left)
            if not ready:
                names = ", ".join(w.training.name for w in busy if w.training)
                self.tell(f"time is up: {names} are stopped and begin anew next time")
                return figures
            for worker in busy:
                if worker.pipe in ready:
                    self._take(worker, done, figures)
            if self.keep is not None and time.monotonic() > kept + KEEP_EVERY:
                # After the next trainings were begun, so that none waits for it.
                self._hand_out(waiting, done)
                self.keep()
                kept = time.monotonic()

    def _lacks_weights(
        self, training: Training, trainings: Sequence[Training], ended: set[str]
    ) -> bool:
        """Whether it must be repeated since a student still needs its weights."""
        if not training.kept or checkpoint_of(self.work, training.name).is_file():
            return False
        return any(t.needs == training.name and t.name not in ended for t in trainings)

    def _hand_out(self, waiting: list[Training], done: set[str]) -> None:
        """Give idle processes the first trainings that may begin and can end."""
        for training in list(waiting):
            if sum(w.training is not None for w in self.workers) >= self.jobs:
                return
            if training.needs is not None and training.needs not in done:
                continue
            if time.monotonic() + self.expected(training) > self.until:
                continue
            idle = next((w for w in self.workers if w.training is None), None)
            if idle is None:
                idle = self._new_worker()
                self.workers.append(idle)
            idle.training, idle.began = training, time.monotonic()
            idle.pipe.send(training)
            waiting.remove(training)

    def _new_worker(self) -> Worker:
        # Forked children of a process that has used torch's threads may hang; a server that has
        # only imported what they need begins them at once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["experiments.study.training"])
        here, there = context.Pipe()
        arguments = (there, self.cohort, self.work, self.threads)
        process = context.Process(target=serve, args=arguments, daemon=True)
        process.start()
        there.close()
        return Worker(process, here)

    def _take(self, worker: Worker, done: set[str], figures: list[dict[str, Any]]) -> None:
        """Note what a process says, or that it died."""
        training = worker.training
        assert training is not None
        worker.training = None
        try:
            kind, content = worker.pipe.recv()
        except (EOFError, OSError):
            kind, content = "failed", "its process died (out of memory, or killed from outside)"
            self.workers.remove(worker)
            with suppress(OSError):
                worker.stop()
        if kind == "failed":
            self.failed[training.name] = content
            self.tell(f"{training.name} failed: {content}")
            return
        figures.append(content)
        done.add(training.name)
        if training.trial:
            return
        taken = time.monotonic() - worker.began
        key = (training.group, training.arm, training.part)
        self.durations[key] = max(taken, self.durations.get(key, 0.0))
        cpu = content["cpu_seconds"] + content["scoring_cpu_seconds"]
        self.tell(f"{time.strftime('%H:%M:%S')} {training.name}: {taken:.0f} s, {cpu:.0f} s of CPU")

    def expected(self, training: Training) -> float:
        """Seconds of a training: as its arm took before, or others of its group, or as planned."""
        key = (training.group, training.arm, training.part)
        same_group = [s for (group, *_), s in self.durations.items() if group == training.group]
        known = self.durations.get(key) or (max(same_group) if same_group else None)
        return MARGIN * known if known else float(training.settings.get("seconds", 0.0))
