"""Log the losses of a training, and notice one that is not finite, without waiting for a GPU.

Their means over an epoch, the number of the progress bar, and the first step at which one is not
finite: such a training ends, and says since when and what to try.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from pmixseg.errors import InputError
from pmixseg.types import Batch

SHOWN_EVERY = 10
"""Steps of a GPU for one loss on the progress bar: Lightning takes most of a millisecond for it."""


class LossLog:
    """What a training says of its losses, and when.

    ``seldom`` is for a GPU: nothing is waited for, and one loss in :data:`SHOWN_EVERY` steps is
    shown, besides that of an epoch's last step.
    """

    def __init__(self, seldom: bool) -> None:
        self.seldom = seldom
        self.means, self.finite = EpochMeans(), FiniteLoss()
        self._late = LateValue()

    def see(
        self,
        names: tuple[str, ...],
        values: Tensor,
        batch: Batch,
        batch_idx: int,
        module: LightningModule,
    ) -> None:
        """Take in the losses of one step, and show their sum on the progress bar.

        The last name is that of the sum; the values are one vector, detached. A part that is not
        finite is refused where that is known without waiting.
        """
        samples = len(batch["image"])
        self.means.add(names, values, samples)
        if module._trainer is None:
            return
        trainer = module.trainer
        # A gradient scaler skips a step that is not finite, and goes on.
        if gradient_scaler(trainer) is None:
            self.finite.see(names[:-1], values[:-1], trainer.global_step)
            if not self.seldom:
                self.finite.check(lambda: float(module.lr), batch)  # type: ignore[arg-type]  # a module of ours
        if self.seldom and batch_idx % SHOWN_EVERY and not trainer.is_last_batch:
            return
        if (shown := self._late.put(values[-1])) is not None:
            module.log("loss", shown, prog_bar=True, logger=False, batch_size=samples)


def gradient_scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
    """Return what keeps gradients in the range of float16, in a training that needs it."""
    scaler: torch.amp.GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
    return scaler


class EpochMeans:
    """Sums up vectors of losses on their device."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], tuple[Tensor, int]] = {}

    def add(self, names: tuple[str, ...], values: Tensor, samples: int) -> None:
        """Add the values of one step, one vector, with its samples as their weight."""
        before = self._sums.get(names)
        if before is None:
            self._sums[names] = (values * samples, samples)
        else:
            total, count = before
            self._sums[names] = (torch.add(total, values, alpha=samples), count + samples)

    def settle(self) -> dict[str, Tensor]:
        """Return the means by name, and begin anew."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for names, (total, count) in self._sums.items():
            for name, value in zip(names, total.unbind(), strict=True):
                sums[name] = sums[name] + value if name in sums else value
                counts[name] = counts.get(name, 0) + count
        self._sums = {}
        return {name: value / counts[name] for name, value in sums.items()}


class LateValue:
    """A number from a GPU that is read when it has arrived, a few steps late, without waiting."""

    def __init__(self) -> None:
        self._coming: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._last: Tensor | None = None

    def put(self, value: Tensor) -> Tensor | None:
        """Send for a scalar, and return the newest number that has arrived, if any has."""
        value = value.detach()
        if value.device.type != "cuda":
            return value
        host = torch.empty((), dtype=value.dtype, pin_memory=True)
        host.copy_(value, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # untyped in torch
        event.record()
        self._coming.append((event, host))
        while self._coming and self._coming[0][0].query():  # type: ignore[no-untyped-call]  # untyped in torch
            self._last = self._coming.popleft()[1]
        return self._last


NEVER = torch.iinfo(torch.int64).max
"""In place of a step: none so far."""


class FiniteLoss:
    """Remember the first step at which each part of the loss was not finite.

    On a GPU nothing waits for a value: the steps are kept on the device until :meth:`check` asks.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._first: Tensor | None = None

    def see(self, names: tuple[str, ...], values: Tensor, step: int) -> None:
        """Look at the parts of the loss of one step."""
        if self._first is None or names != self._names:
            self._names = names
            self._first = torch.full(values.shape, NEVER, device=values.device)
        now = torch.where(values.isfinite(), NEVER, step)
        self._first = torch.minimum(self._first, now)

    def check(self, rate: Callable[[], float], batch: Batch | None = None) -> None:
        """Ask for the values, and refuse a part that was not finite, with advice on the rate.

        The cause may be the images of the batch, that of the last step, where nothing waits for it.
        """
        if self._first is None:
            return
        steps: Sequence[int] = self._first.tolist()
        if min(steps) == NEVER:
            return
        self._first = None
        for name, image in zip(batch["case_id"], batch["image"], strict=True) if batch else ():
            if not bool(image.isfinite().all()):
                raise InputError(
                    f"the image of case '{name}' holds NaN or infinity at step {min(steps)}, so "
                    "the training ends; correct its scans, or the code that reads or augments them."
                )
        guilty = [n for n, s in zip(self._names, steps, strict=True) if s == min(steps)]
        raise InputError(
            f"the loss is not finite since step {min(steps)} ({', '.join(guilty)}), so the "
            f"training ends; try a lower learning rate than {rate():g}, "
            "gradient_clip_val 1 (--trainer.gradient_clip_val), or a lower weight of that term."
        )
