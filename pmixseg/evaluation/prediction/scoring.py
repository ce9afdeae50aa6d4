"""Score a finished case in threads while a GPU predicts the next one."""

from __future__ import annotations

import os
import queue
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

import torch

from pmixseg.evaluation.prediction.cases import CasePrediction, Each, Rows

Work = TypeVar("Work")


Score = Callable[[Iterable[CasePrediction], Each], Rows]
"""Makes rows of the predictions of one case, each of which is scored by what it is given."""

WAITING = 16
"""Predictions that wait for the thread of their case, at most; three cases are in hand at once."""
MOST_SCORERS = 8
"""Threads that score the predictions of a case; one score takes longer than a GPU's prediction."""


def scorers(processes: int) -> int:
    """Return how many threads score at a time, where so many processes share the machine."""
    return max(1, min(MOST_SCORERS, (os.cpu_count() or 1) // max(processes, 1)))


class CaseRows:
    """Rows of all cases of a test, in the order in which the cases came.

    So many ``threads`` score at a time, where scores are made apart from the network.
    """

    def __init__(self, threads: int = 1) -> None:
        self._rows: Rows = []
        self._coming: deque[Future[Rows]] = deque()
        self._threads = threads
        self._pools: tuple[ThreadPoolExecutor, ThreadPoolExecutor] | None = None

    def add(
        self,
        score: Score,
        predictions: Iterable[CasePrediction],
        *,
        apart: bool,
        device: torch.device | None = None,
    ) -> None:
        """Score a case.

        The network runs while the predictions are iterated over, here. Where they are scored
        ``apart``, in a thread, the rows come later, and so does an error; on a CPU it would take
        the time of the network.
        """
        if not apart:
            self._rows += score(predictions, map)
            return
        if self._pools is None:
            # One thread takes the cases in their order, the others its predictions.
            self._pools = (
                ThreadPoolExecutor(1, thread_name_prefix="case"),
                ThreadPoolExecutor(self._threads, thread_name_prefix="scores"),
            )
        while len(self._coming) > 1:
            self._rows += self._coming.popleft().result()
        ready: queue.Queue[CasePrediction | None] = queue.Queue(WAITING)
        one, many = self._pools

        def each(
            function: Callable[[CasePrediction], Rows], some: Iterable[CasePrediction]
        ) -> Iterable[Rows]:
            return many.map(_beside_network(function, device), some)

        def whole(some: Iterable[CasePrediction]) -> Rows:
            return score(some, each)

        coming = one.submit(_beside_network(whole, device), iter(ready.get, None))
        self._coming.append(coming)
        try:
            for prediction in predictions:
                _put(ready, prediction, coming)
        finally:
            _put(ready, None, coming)

    @property
    def rows(self) -> Rows:
        """Rows of every case, when all are scored."""
        while self._coming:
            self._rows += self._coming.popleft().result()
        for pool in self._pools or ():
            pool.shutdown()
        self._pools = None  # a module with a thread could not be copied
        return self._rows


def _beside_network(
    function: Callable[[Work], Rows], device: torch.device | None
) -> Callable[[Work], Rows]:
    """Return a function that runs without waiting for work queued for the network since.

    In the network's own stream, every number would come after all that waits there. What is read is
    whole: its sum has been asked for.
    """
    on_card = device is not None and device.type == "cuda"

    def apart(work: Work) -> Rows:
        stream = torch.cuda.stream(torch.cuda.Stream(device)) if on_card else nullcontext()  # type: ignore[no-untyped-call]  # untyped in torch
        with stream, torch.inference_mode():  # of each thread its own; predictions were made in it
            return function(work)

    return apart


def _put(
    ready: queue.Queue[CasePrediction | None],
    prediction: CasePrediction | None,
    coming: Future[Rows],
) -> None:
    """Hand a prediction over, unless nobody waits for it any more."""
    while not coming.done():
        try:
            ready.put(prediction, timeout=0.1)
            return
        except queue.Full:
            continue
