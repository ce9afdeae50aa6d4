"""Sums over the processes of a distributed training, with gradients."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of ``value`` over all processes; ``value`` itself where there is only one.

    The gradient is the sum of the gradients of all processes. With DDP's mean over processes it
    is what one process on the joined batch computes, if every process adds the *mean* over its
    own samples to the loss and all have as many. Every process must call this equally often.

    Args:
        value: any shape, the same on all processes.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return value
    from torch.distributed.nn.functional import all_reduce  # absent from builds without distributed

    total: Tensor = all_reduce(value)  # type: ignore[no-untyped-call]  # torch ships no type
    return total
