"""Share samples and sums between the processes of a distributed training."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pmixseg.types import Scalar


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of ``value`` over all processes, through which no gradient flows.

    Every process must call this equally often.
    """
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


class SharedSums:
    r"""Sums over all processes, with gradients that travel in the forward pass.

    A loss :math:`L_r(x_r, S)` with :math:`S = \sum_q s_q(x_q)` gives every process a gradient
    through S of all losses, :math:`\frac{\partial s_q}{\partial x_q}^T \sum_r
    \frac{\partial L_r}{\partial S}`. Left to autograd, the inner sum would be taken in the backward
    pass, amid DDP's own reductions, and at another place among them where processes skip
    different encoders: tensors of different meaning would be added up. So :meth:`settle` takes it
    in the forward pass, where every process does the same in the same order.

    With DDP's mean over processes the gradient is what one process on the joined batch computes,
    if every process adds the *mean* over its own samples to the loss and all have as many.
    """

    def __init__(self) -> None:
        self._sums: list[tuple[Tensor, Tensor]] = []

    def add(self, own: Tensor) -> Tensor:
        """Sum of ``own`` over all processes; ``own`` itself where there is only one."""
        if world_size() == 1:
            return own
        total = sum_over_ranks(own)
        if torch.is_grad_enabled():
            self._sums.append((own, total.requires_grad_()))
        return total

    def gather(self, own: Tensor) -> Tensor:
        """Join ``[B, ...]`` of all processes, of one shape, along the first axis; with gradient."""
        if world_size() == 1:
            return own
        places: list[Tensor] = [torch.zeros_like(own)] * world_size()
        places[dist.get_rank()] = own
        return self.add(torch.cat(places))

    def settle(self, loss: Scalar) -> Scalar:
        """Return the same loss, with its gradient through the sums; once, when it is complete."""
        totals = [total for _, total in self._sums]
        slopes = [torch.zeros_like(total) for total in totals]
        if totals and loss.requires_grad:
            slopes = list(
                torch.autograd.grad(loss, totals, retain_graph=True, materialize_grads=True)
            )
        for (own, _), slope in zip(self._sums, slopes, strict=True):
            of_all = sum_over_ranks(slope)  # on every process, whatever it has to send
            if own.requires_grad:
                loss = loss + (of_all * (own - own.detach())).sum()
        return loss


def gather_constants(value: Tensor) -> Tensor:
    """Join ``[B, ...]`` of all processes, of one shape, along the first axis; without gradient."""
    value = value.detach()
    if world_size() == 1:
        return value
    gathered = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(gathered, value.contiguous())
    return torch.cat(gathered)


def world_size() -> int:
    """Return the number of processes of the training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
