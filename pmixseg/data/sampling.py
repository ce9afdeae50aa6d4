"""Order of the samples in every epoch and on every process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import distributed
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from pmixseg.data.keys import generator, make_key
from pmixseg.errors import InputError
from pmixseg.workers import NOT_BEGUN, end_if_read_anew


def rank_and_world(rank: int | None, world: int | None) -> tuple[int, int]:
    """Return this process's rank and the number of processes, as given or else as torch says."""
    here = (0, 1)
    if distributed.is_available() and distributed.is_initialized():
        here = distributed.get_rank(), distributed.get_world_size()
    return here[0] if rank is None else rank, here[1] if world is None else world


class EpochSampler(DistributedSampler[tuple[int, int]]):
    """Yields (epoch, index): a shuffled pass over a cohort, the same however many ranks share it.

    An epoch has ``cases · patches_per_case`` samples, index i belonging to case i mod cases,
    rounded up to whole batches on all ranks together. What is added are further patches, of
    cases chosen at random: no index comes twice, none is left out, and all ranks take equally many
    steps. The joined batch of W ranks with batch size B is that of one process with batch size
    W·B.

    Lightning calls :meth:`set_epoch`; it does not replace a subclass of ``DistributedSampler`` by
    its own. The epoch travels with the index because a worker that outlives the epoch has its own
    copy of everything else.

    ``done`` batches of the next pass are left out: a training that goes on has made them.

    Rank and world are by default what torch.distributed says.
    """

    def __init__(
        self,
        cases: int,
        patches_per_case: int,
        batch_size: int,
        seed: int,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        self.rank, self.num_replicas = rank_and_world(rank, world)
        self.cases, self.batch_size, self.seed = cases, batch_size, seed
        self.epoch = self.done = 0
        step = batch_size * self.num_replicas
        self.total_size = -(-cases * patches_per_case // step) * step

    def __len__(self) -> int:
        return self.total_size // self.num_replicas

    def __iter__(self) -> Iterator[tuple[int, int]]:
        draw = generator(make_key(self.seed, self.epoch, 0), "order")
        whole = self.total_size // self.cases * self.cases
        some = torch.randperm(self.cases, generator=draw)[: self.total_size - whole]
        indices = torch.cat([torch.arange(whole), whole + some])
        order = indices[torch.randperm(len(indices), generator=draw)]
        mine = order.view(-1, self.num_replicas, self.batch_size)[self.done :, self.rank].flatten()
        self.done = 0
        return iter([(self.epoch, index) for index in mine.tolist()])


class SameOrder(SequentialSampler, DistributedSampler[Any]):
    """Yields the same samples in every epoch: training that is to overfit.

    Lightning puts a :class:`~torch.utils.data.SequentialSampler` in the place of any other sampler
    when ``overfit_batches`` is set, and a ``DistributedSampler`` of its own in the place of any
    other where there are several processes. Ours have dealt the samples to the processes already.
    """

    def __init__(self, samples: Iterable[Any]) -> None:
        self.samples = list(samples)
        super().__init__(self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)


class EpochLoader(DataLoader[Any]):
    """A data loader that asks its sampler for nothing before the first batch is wanted.

    Lightning makes a loader's iterator before it sets the sampler's epoch. Workers start to fetch
    the moment an iterator is made, so a resumed run would begin with the samples of epoch 0.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator is what waits
        if self.num_workers:
            end_if_read_anew()
        begun = False
        try:
            for batch in super().__iter__():
                begun = True
                yield batch
        except RuntimeError as error:
            if begun or "exited unexpectedly" not in str(error):
                raise
            raise InputError(
                f"the workers that read patches ended before the first batch: {NOT_BEGUN}"
            ) from error


class CaseSampler(DistributedSampler[int]):
    """Deals cases to ranks in turn, every case once; only a rank left with nothing repeats one.

    (A rank without a batch would skip the loop that the others wait in.) Results are keyed by case
    id (validation's too, :class:`~pmixseg.evaluation.scores.case_scores.CaseMeans`), so the
    repetition changes no number.
    """

    def __init__(self, cases: int, rank: int | None = None, world: int | None = None) -> None:
        self.rank, self.num_replicas = rank_and_world(rank, world)
        dealt = range(cases)[self.rank :: self.num_replicas]
        self.indices = list(dealt) or [self.rank % cases] if cases else []

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
