"""Trace a model for one fixed combination of modalities."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from pmixseg.modules import SegmentationModule
from pmixseg.task import Combination


class FixedCombination(nn.Module):
    """A model that is shown one combination, as a plain function of one tensor."""

    def __init__(self, module: SegmentationModule, combination: Combination) -> None:
        super().__init__()
        self.backbone, self.anchor = module.backbone, module.anchor  # owners of the parameters
        # Not registered: tracing looks into every submodule, and a LightningModule minds.
        object.__setattr__(self, "_module", module)
        self.flags = [m in combination for m in module.modalities]
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        """Predict probabilities ``[1, C, D, H, W]`` of scans ``[1, len(combination), D, H, W]``."""
        module: SegmentationModule = self.__dict__["_module"]
        scans = iter(image.unbind(1))
        zero = torch.zeros_like(image[:, 0])
        channels = torch.stack([next(scans) if flag else zero for flag in self.flags], 1)
        with KnownFlags() as known:
            latents = module.encode(channels, known.flags(self.flags, image.device))
            return module.decode(latents).logits.float().softmax(1)


class KnownFlags(TorchFunctionMode):
    """Lets tracing read presence flags, which are data to torch but constants here.

    Backbones skip encoders by ``present.tolist()``; a trace refuses to read data. While this mode
    is active, everything that is computed from the flags alone is computed a second time outside
    the trace, and read from there.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def flags(self, values: list[bool], device: torch.device) -> Tensor:
        """Return a row of flags ``[1, M]`` that may be read."""
        with _disable_current_modes():
            real = torch.tensor([values], device=device)
        return self._remember(torch.tensor([values], device=device), real)

    def _remember(self, traced: Tensor, real: Tensor) -> Tensor:
        # The traced tensor is kept, so that its id stays its own.
        self._known[id(traced)] = (traced, real)
        return traced

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Compute what depends on flags alone twice."""
        call = (args, kwargs or {})
        # Of anything besides flags: traced as ever.
        tensors = [a for a in tree_flatten(call)[0] if isinstance(a, Tensor)]
        if not tensors or any(id(t) not in self._known for t in tensors):
            return func(*call[0], **call[1])
        # Once with what the flags are. Values that Python reads (a list, a bool) are these.
        real_args, real_kwargs = tree_map(self._real, call)
        with _disable_current_modes():
            real = func(*real_args, **real_kwargs)
        values = tree_flatten(real)[0]
        if not any(isinstance(v, Tensor) for v in values):
            return real
        # Once in the trace; its tensors are known by those computed beside it.
        traced = func(*call[0], **call[1])
        for one, value in zip(tree_flatten(traced)[0], values, strict=True):
            if isinstance(value, Tensor):
                self._remember(one, value)
        return traced

    def _real(self, value: Any) -> Any:
        return self._known[id(value)][1] if isinstance(value, Tensor) else value
