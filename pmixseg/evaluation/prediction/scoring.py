"""Score a finished case in a thread while a GPU predicts the next one."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from pmixseg.evaluation.prediction.cases import CasePrediction

Rows = list[dict[str, Any]]
Score = Callable[[Iterable[CasePrediction]], Rows]

WAITING = 16
"""Predictions that wait for their scores, at most: each holds the probabilities of a case."""


class CaseRows:
    """Rows of all cases of a test, in the order in which the cases came."""

    def __init__(self) -> None:
        self._rows: Rows = []
        self._coming: deque[Future[Rows]] = deque()
        self._pool: ThreadPoolExecutor | None = None

    def add(
        self,
        score: Score,
        predictions: Iterable[CasePrediction],
        *,
        apart: bool,
        device: torch.device | None = None,
    ) -> None:
        """Score a case.

        Args:
            score: makes rows of predictions.
            predictions: of one case; the network runs while they are iterated over, here.
            apart: score in a thread; the rows come later, and so does an error. On a CPU it would
                take the time of the network.
            device: where the predictions lie.
        """
        if not apart:
            self._rows += score(predictions)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="scores")
        while len(self._coming) > 1:
            self._rows += self._coming.popleft().result()
        ready: queue.Queue[CasePrediction | None] = queue.Queue(WAITING)
        coming = self._pool.submit(_scored, score, iter(ready.get, None), device)
        self._coming.append(coming)
        try:
            for prediction in predictions:
                _put(ready, prediction, coming)
        finally:
            _put(ready, None, coming)

    @property
    def rows(self) -> Rows:
        """Rows of every case, when all are scored.

        Raises:
            InputError: see what scores a case.
        """
        while self._coming:
            self._rows += self._coming.popleft().result()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None  # a module with a thread could not be copied
        return self._rows


def _scored(
    score: Score, predictions: Iterator[CasePrediction], device: torch.device | None
) -> Rows:
    own_stream: AbstractContextManager[Any] = nullcontext()
    if device is not None and device.type == "cuda":
        # In the network's own stream, every number would come after all that waits there. What is
        # read is whole: its sum has been asked for.
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # untyped in torch
        own_stream = torch.cuda.stream(stream)
    with own_stream, torch.inference_mode():  # of each thread its own; predictions were made in it
        return score(predictions)


def _put(
    ready: queue.Queue[CasePrediction | None],
    prediction: CasePrediction | None,
    coming: Future[Rows],
) -> None:
    """Hand a prediction over, unless nobody takes it any more."""
    while not coming.done():
        try:
            ready.put(prediction, timeout=0.1)
            return
        except queue.Full:
            continue
