"""The rules of a loss term, ``forward(output: SegOutput, batch: Batch) -> Scalar``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pmixseg.argument_checks import checked
from pmixseg.backbones.base import Backbone
from pmixseg.backbones.unet import MultiEncoderUNet
from pmixseg.losses.distillation import DistillationLoss
from pmixseg.testing.findings import TOLERANCE, difference, expect, run_rules
from pmixseg.testing.probe import NOISE, default_size
from pmixseg.types import Batch, Latents, SegOutput


@dataclass
class Example:
    """What a term is called with; the tensors of ``output`` are leaves that take gradients."""

    output: SegOutput
    batch: Batch

    def leaves(self) -> list[Tensor]:
        """Return every floating tensor of the output that a term may differentiate."""
        named = self.everything().items()
        return [t for name, t in named if name.startswith("output") and t.is_floating_point()]

    def everything(self) -> dict[str, Tensor]:
        """Return every tensor, by the name that an error gives it."""
        out, latents = self.output, self.output.latents
        named = {"output.logits": out.logits}
        named |= {f"output.extras['{k}']": v for k, v in out.extras.items()}
        named |= {f"output.decoder[{k}]": v for k, v in enumerate(out.decoder)}
        named |= {f"output.latents.features[{k}]": v for k, v in enumerate(latents.features)}
        named |= {f"output.latents.usable[{k}]": v for k, v in enumerate(latents.usable)}
        variances = latents.log_variance or []
        named |= {f"output.latents.log_variance[{k}]": v for k, v in enumerate(variances)}
        named |= {f"batch['{k}']": v for k, v in self.batch.items() if isinstance(v, Tensor)}
        return named


class Stage:
    """Makes examples from a backbone in training mode.

    The term is copied for every rule, since it may keep a running state.
    """

    def __init__(self, net: Backbone, term: nn.Module) -> None:
        self.net = copy.deepcopy(net).train()
        self.original = term
        self.device = next(self.net.parameters()).device

    def term(self) -> nn.Module:
        """Return a fresh term in training mode, on the backbone's device."""
        torch.manual_seed(0)
        return copy.deepcopy(self.original).to(self.device).train()

    def flags(self, rows: list[list[int]]) -> Tensor:
        """Make presence with ``rows`` of modality indices."""
        flags = torch.zeros(len(rows), len(self.net.modalities), dtype=torch.bool)
        for row, some in zip(flags, rows, strict=True):
            row[[m % flags.shape[1] for m in some]] = True
        return flags.to(self.device)

    def example(
        self, present: Tensor, acquired: Tensor | None = None, *, bf16: bool = False
    ) -> Example:
        """Return one batch; ``acquired`` defaults to ``present``."""
        torch.manual_seed(1)
        acquired = present if acquired is None else acquired
        samples, size = len(present), default_size(self.net)
        # Noise for scans, 0 where nothing was acquired.
        image = torch.randn(samples, len(self.net.modalities), *size, device=self.device)
        image = torch.where(acquired[:, :, None, None, None], image, 0.0)
        batch = Batch(
            image=image,
            label=torch.randint(self.net.num_classes, (samples, *size), device=self.device),
            case_id=[f"case{b}" for b in range(samples)],
            acquired=acquired,
            key=torch.arange(samples, device=self.device),
            present=present,
        )
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            out = self.net(image, present)
        # What the network made of it, as leaves whose gradients can be looked at.
        latents = out.latents
        variance = latents.log_variance
        leaves = Latents(
            [_leaf(f) for f in latents.features],
            latents.modalities,
            list(latents.usable),
            None if variance is None else [_leaf(v) for v in variance],
        )
        extras = {name: _leaf(extra) for name, extra in out.extras.items()}
        maps = [_leaf(each) for each in out.decoder]
        return Example(SegOutput(_leaf(out.logits), leaves, extras, maps), batch)

    def usual(self, *, bf16: bool = False) -> Example:
        """Make two samples: everything shown; and one modality of several acquired, one missing."""
        everything = list(range(len(self.net.modalities)))
        present = self.flags([everything, [0]])
        return self.example(present, self.flags([everything, everything[:-1] or [0]]), bf16=bf16)


class TaughtByItself(nn.Module):
    """Call a distillation loss as a term: the teacher's output is half of the student's."""

    def __init__(self, loss: DistillationLoss, net: Backbone) -> None:
        super().__init__()
        self.loss = loss
        loss.bind(net, net)

    def forward(self, output: SegOutput, batch: Batch) -> Tensor:
        """Return the loss."""
        half = copy.deepcopy(output)
        for tensor in Example(half, batch).leaves():
            tensor.requires_grad_(False).mul_(0.5)
        return self.loss(output, half, batch)


@checked
def check_term(
    term: nn.Module | Callable[[], nn.Module],
    backbone: Backbone | None = None,
    *,
    skip: Collection[str] = (),
) -> None:
    """Check that a loss term keeps its contract, and report every rule that it breaks.

    The rules: ``scalar, inputs, gradient, parameters, absent, one sample, one modality, bf16``.

    Args:
        term: the term, bound to its backbone if it needs to be, or a function that makes it. A
            :class:`~pmixseg.losses.DistillationLoss` is bound, and taught by half of the output.
        backbone: makes the examples; default a small :class:`MultiEncoderUNet` of four modalities.
        skip: rules not to check.

    Raises:
        ConformanceError: one line for each broken rule.
        InputError: ``skip`` names no rule.

    Example:
        >>> class Confidence(nn.Module):
        ...     def forward(self, output, batch):
        ...         return output.logits.float().softmax(1).amax(1).mean()
        >>> check_term(Confidence())
    """
    net = backbone or MultiEncoderUNet(width=4, levels=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = term if isinstance(term, nn.Module) else term()
        name = type(made).__name__
        if isinstance(made, DistillationLoss):
            made = TaughtByItself(copy.deepcopy(made), net)
        stage = Stage(net, made)
        rules: dict[str, Callable[[], object]] = {
            "scalar": lambda: _value(stage, stage.usual()),
            "inputs": lambda: _inputs(stage),
            "gradient": lambda: _gradient(stage),
            "parameters": lambda: _parameters(stage),
            "absent": lambda: _absent(stage),
            "one sample": lambda: _alone(stage, stage.example(stage.flags([[0, 1]]))),
            "one modality": lambda: _alone(stage, stage.example(stage.flags([[0], [1]]))),
            "bf16": lambda: _bf16(stage),
        }
        run_rules(name, rules, skip)


def _value(stage: Stage, example: Example) -> Tensor:
    value = stage.term()(example.output, example.batch)
    expect(
        isinstance(value, Tensor) and value.ndim == 0,
        f"returned {list(value.shape) if isinstance(value, Tensor) else type(value).__name__}; a "
        "term returns a tensor without dimensions",
    )
    expect(bool(value.isfinite()), f"returned {value.item()}; a term must always be finite")
    made: Tensor = value
    return made


def _inputs(stage: Stage) -> None:
    example = stage.usual()
    before = {name: tensor.detach().clone() for name, tensor in example.everything().items()}
    # Leaves would refuse to be changed in place, and hide which of them was.
    for leaf in example.leaves():
        leaf.requires_grad_(False)
    _value(stage, example)
    after = example.everything()
    changed = [n for n, old in before.items() if n not in after or not torch.equal(old, after[n])]
    expect(not changed, f"changed {', '.join(changed)} in place; other terms read them too")


def _gradient(stage: Stage) -> None:
    example = stage.usual()
    value = _value(stage, example)
    expect(
        value.requires_grad,
        "the value has no graph; nothing that the network computed reaches it without detach",
    )
    _finite_gradient(value, example)
    moved = [x.grad for x in example.leaves() if x.grad is not None]
    expect(
        any(bool(g.any()) for g in moved),
        "no gradient reaches logits, latents, extras or decoder, so the term cannot train the "
        "network",
    )


def _finite_gradient(value: Tensor, example: Example) -> None:
    value.backward()  # type: ignore[no-untyped-call]  # untyped in torch
    wrong = [
        name
        for name, tensor in example.everything().items()
        if tensor.grad is not None and not tensor.grad.isfinite().all()
    ]
    expect(not wrong, f"the gradient of {', '.join(wrong)} is not finite")


def _parameters(stage: Stage) -> None:
    example, term = stage.usual(), stage.term()
    value = term(example.output, example.batch)
    if value.requires_grad:
        value.backward()
    without = [n for n, p in term.named_parameters() if p.requires_grad and p.grad is None]
    expect(
        not without,
        f"no gradient for {', '.join(without)}; drop what is not used, or freeze what is a teacher",
    )


def _absent(stage: Stage) -> None:
    example, other = stage.usual(), stage.usual()
    torch.manual_seed(2)
    latents = other.output.latents
    with torch.no_grad():
        for level in range(len(latents)):
            hidden = ~latents.flags(level)
            for maps in (latents.features, latents.log_variance or []):
                if maps:
                    maps[level].add_(hidden * NOISE * torch.randn_like(maps[level]))
        image, acquired = other.batch["image"], other.batch["acquired"]
        hidden = ~acquired[:, :, None, None, None]
        other.batch["image"] = image + hidden * NOISE * torch.randn_like(image)
    deviation = difference(_value(stage, example), _value(stage, other))
    expect(
        deviation <= TOLERANCE,
        f"noise in latents that are not present, and in images that were not acquired, changes the "
        f"value by {deviation:.1e} of its size; read latents.masked(level) and count present slots",
    )


def _alone(stage: Stage, example: Example) -> None:
    value = _value(stage, example)
    if value.requires_grad:
        _finite_gradient(value, example)


def _bf16(stage: Stage) -> None:
    example = stage.usual(bf16=True)
    with torch.autocast(stage.device.type, torch.bfloat16):
        value = _value(stage, example)
    expect(
        value.dtype == torch.float32,
        f"under bf16 autocast the value is {value.dtype}; compute means and exponentials in "
        "float32 (tensor.float())",
    )
    if value.requires_grad:
        _finite_gradient(value, example)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point())
