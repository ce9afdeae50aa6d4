"""What the processes of a distributed training must know of each other's samples."""

from __future__ import annotations

import torch
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
    if not _several():
        return value
    from torch.distributed.nn.functional import all_reduce  # absent from builds without distributed

    total: Tensor = all_reduce(value)  # type: ignore[no-untyped-call]  # torch ships no type
    return total


def gather_constants(value: Tensor) -> Tensor:
    """``value`` of all processes, joined along the first axis; no gradient flows through it.

    Args:
        value: ``[B, ...]``, of one shape on all processes.

    Returns:
        ``[B * processes, ...]``.
    """
    value = value.detach()
    if not _several():
        return value
    gathered = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, value.contiguous())
    return torch.cat(gathered)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
