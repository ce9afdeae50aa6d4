"""The rules of :class:`pmixseg.backbones.Backbone`, each as a check."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pmixseg.argument_checks import checked
from pmixseg.backbones.base import Backbone
from pmixseg.testing import mechanics
from pmixseg.testing.findings import TOLERANCE, difference, expect, first_few, run_rules
from pmixseg.testing.probe import NOISE, Probe, default_size
from pmixseg.types import Latents, SegOutput


@checked
def check_backbone(
    net: Backbone,
    size: int | Sequence[int] | None = None,
    *,
    compile: bool | str = False,
    skip: Collection[str] = (),
) -> None:
    """Check that a backbone keeps its contract, and report every rule that it breaks.

    The rules: ``attributes, shape, decoder, inputs, leak, masking, fill, batch, gradient,
    determinism, restrict, sizes, state dict, description, channels last, bf16, compile``. Random
    weights are enough. ``net`` itself is not changed.

    Args:
        net: the backbone, on any device.
        size: patch to try, in voxels; default twice the largest stride.
        compile: also check ``torch.compile``; a string names the backend.
        skip: rules not to check.

    Raises:
        ConformanceError: one line for each broken rule.
        InputError: ``skip`` names no rule.
    """
    sides = (size,) * 3 if isinstance(size, int) else size or default_size(net)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe = Probe(net, sides)
        rules: dict[str, Callable[[Probe], None]] = {
            "attributes": _attributes,
            "shape": _shape,
            "decoder": _decoder,
            "inputs": _inputs,
            "leak": _leak,
            "masking": _masking,
            "fill": _fill,
            "batch": _batch,
            "gradient": _gradient,
            "determinism": _determinism,
            "restrict": _restrict,
            "sizes": _sizes,
            "state dict": mechanics.state_dict,
            "description": mechanics.description,
            "channels last": mechanics.channels_last,
            "bf16": mechanics.bf16,
        }
        bound: dict[str, Callable[[], None]] = {n: partial(r, probe) for n, r in rules.items()}
        bound["compile"] = partial(mechanics.compiled, probe, compile)
        run_rules(type(net).__name__, bound, skip)


def _attributes(probe: Probe) -> None:
    net = probe.net
    expect(
        len(net.channels) == len(net.strides) > 0,
        f"channels {net.channels} and strides {net.strides} must have one entry per level",
    )
    expect(
        list(net.strides) == sorted(net.strides),
        f"strides {net.strides} must be given finest first",
    )
    expect(
        probe.splits_slots or not net.shares_encoding,
        f"slots {tuple(net.slots)} are not the modalities, so shares_encoding must be False",
    )


def _check_shapes(net: Backbone, out: SegOutput, image: Tensor, present: Tensor) -> None:
    size = image.shape[2:]
    shape = [image.shape[0], net.num_classes, *size]
    expect(
        list(out.logits.shape) == shape,
        f"logits have the shape {list(out.logits.shape)}; it must be {shape}",
    )
    expect(bool(out.logits.isfinite().all()), "logits are not finite")
    # Latents: as many levels as strides, and what was present marked in each.
    latents = out.latents
    expect(
        len(latents) == len(net.strides) == len(latents.usable),
        f"latents have {len(latents)} levels and flags for {len(latents.usable)}, but strides "
        f"are {net.strides}",
    )
    expect(
        tuple(latents.modalities) == tuple(net.slots),
        f"latents name the slots {latents.modalities}; they must be {tuple(net.slots)}",
    )
    for level, (feature, stride) in enumerate(zip(latents.features, net.strides, strict=True)):
        maps = [feature] if latents.log_variance is None else [feature, latents.log_variance[level]]
        sides = [side // stride for side in size]
        shape = [image.shape[0], len(net.slots), net.channels[level], *sides]
        for features in maps:
            expect(
                list(features.shape) == shape,
                f"level {level} has the shape {list(features.shape)}; with channels "
                f"{net.channels[level]} and stride {stride} it must be {shape}",
            )
        flags = latents.usable[level]
        expected = present if len(net.slots) == present.shape[1] else present.any(1, keepdim=True)
        expect(
            flags.dtype == torch.bool and torch.equal(flags, expected),
            f"latents.usable[{level}] is not what was given as present",
        )


def _shape(probe: Probe) -> None:
    with torch.no_grad():
        out = probe.eval()(probe.image, probe.present)
    _check_shapes(probe.net, out, probe.image, probe.present)
    expect(not out.extras, f"extras {sorted(out.extras)} must be empty in eval mode")


def _decoder(probe: Probe) -> None:
    with torch.no_grad():
        maps = probe.eval()(probe.image, probe.present).decoder
        trained = copy.deepcopy(probe.net).train()(probe.image, probe.present).decoder
    # The same maps in both modes.
    shapes = [list(each.shape) for each in maps]
    expect(
        shapes == [list(each.shape) for each in trained],
        "decoder has other feature maps in eval than in training mode; a frozen teacher gives its "
        "maps in eval mode",
    )
    # Each divides the image, and the finest is the last.
    size, previous = list(probe.image.shape[2:]), 0
    for k, each in enumerate(maps):
        wrong = (
            each.ndim != 5
            or len(each) != len(probe.image)
            or any(side % own for side, own in zip(size, each.shape[2:], strict=True))
        )
        expect(
            not wrong,
            f"decoder[{k}] has the shape {list(each.shape)}; it must be [{len(probe.image)}, C, d, "
            f"h, w] with sides that divide {size}",
        )
        expect(bool(each.isfinite().all()), f"decoder[{k}] is not finite")
        voxels = each.shape[2:].numel()
        expect(voxels >= previous, f"decoder[{k}] is coarser than the map before it; finest last")
        previous = voxels
    if not maps:
        return
    # None of them sees what is absent.
    noisy = torch.where(probe.absent, NOISE * probe.draw(2), probe.image)
    with torch.no_grad():
        again = probe.eval()(noisy, probe.present).decoder
    deviation = max(difference(a, b) for a, b in zip(maps, again, strict=True))
    expect(
        deviation <= TOLERANCE,
        f"noise in the voxels of absent modalities changes the decoder's maps by {deviation:.1e} "
        "of their size; encode only what is present",
    )


def _inputs(probe: Probe) -> None:
    image, present = probe.image.clone(), probe.present.clone()
    probe.net.train()(image, present)
    expect(torch.equal(image, probe.image), "image was changed in place")
    expect(torch.equal(present, probe.present), "present was changed in place")


def _leak(probe: Probe) -> None:
    noisy = torch.where(probe.absent, NOISE * probe.draw(2), probe.image)
    for net, mode in ((probe.eval(), "eval"), (copy.deepcopy(probe.net).train(), "training")):
        clean = probe.logits(net, probe.image, probe.present)
        deviation = difference(clean, probe.logits(net, noisy, probe.present))
        expect(
            deviation <= TOLERANCE,
            f"noise in the voxels of absent modalities changes the logits by {deviation:.1e} of "
            f"their size in {mode} mode; encode only what is present",
        )


def _masking(probe: Probe) -> None:
    if not probe.splits_slots:
        return
    net = probe.eval()
    with torch.no_grad():
        latents = net.encode(probe.image, probe.present)
        clean = net.decode(latents).logits
        deviation = difference(clean, net.decode(_replace_absent(latents)).logits)
    expect(
        deviation <= TOLERANCE,
        "what stands in the latents of absent slots changes the logits by "
        f"{deviation:.1e} of their size; decode must read latents.masked(level)",
    )


def _replace_absent(latents: Latents) -> Latents:
    def noisy(maps: list[Tensor]) -> list[Tensor]:
        return [
            torch.where(latents.flags(level), f, NOISE * torch.randn_like(f))
            for level, f in enumerate(maps)
        ]

    variance = None if latents.log_variance is None else noisy(latents.log_variance)
    return replace(latents, features=noisy(latents.features), log_variance=variance, cache={})


def _fill(probe: Probe) -> None:
    if not probe.splits_slots or len(probe.net.modalities) == 1:
        return
    net = probe.eval()
    with torch.no_grad():
        latents = net.encode(probe.image, probe.present)
        empty = net.decode(latents).logits
        filled = replace(
            _replace_absent(latents), usable=[torch.ones_like(probe.present)] * len(latents)
        )
        deviation = difference(empty, net.decode(filled).logits)
    expect(
        deviation > TOLERANCE,
        "a slot that was filled after encoding and marked present has no influence; decode must "
        "take presence from latents.usable, not from what encode was given",
    )


def _batch(probe: Probe) -> None:
    net = probe.eval()
    together = probe.logits(net, probe.image, probe.present)
    for b in range(2):
        alone = probe.logits(net, probe.image[b : b + 1], probe.present[b : b + 1])
        deviation = difference(alone, together[b : b + 1])
        expect(
            deviation <= TOLERANCE,
            f"sample {b} of a batch differs by {deviation:.1e} from the same sample alone; every "
            "sample has its own row of present, and samples must not mix",
        )
    image = probe.image.clone().requires_grad_()
    logits = probe.net.train()(image, probe.present).logits
    (gradient,) = torch.autograd.grad((logits[0] * torch.randn_like(logits[0])).sum(), image)
    expect(
        not bool(gradient[1].any()),
        "in training mode the logits of one sample depend on another (batch norm?); use instance "
        "or group norm",
    )


def _gradient(probe: Probe) -> None:
    net = copy.deepcopy(probe.net).train()
    for start in range(0, len(probe.combinations), 4):
        some = probe.combinations[start : start + 4]
        out = net(probe.draw(len(some)), some)
        outputs = [out.logits, *out.extras.values()]
        sum((o * torch.randn_like(o)).sum() for o in outputs if o.requires_grad).backward()  # type: ignore[union-attr]  # a tensor, not int 0
    without = [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None]
    expect(
        not without,
        f"no combination gives a gradient to {first_few(without)}; drop what is not used",
    )
    wrong = [
        n for n, p in net.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
    ]
    expect(not wrong, f"the gradient of {first_few(wrong)} is not finite")


def _determinism(probe: Probe) -> None:
    net = probe.eval()
    with torch.no_grad():
        first, second = (net(probe.image, probe.present).logits for _ in range(2))
    deviation = difference(first, second)
    expect(
        deviation <= TOLERANCE / 100,
        f"two calls in eval mode differ by {deviation:.1e}; no dropout and no sampling in eval",
    )


def _restrict(probe: Probe) -> None:
    if not probe.net.shares_encoding:
        return
    net = probe.eval()
    everything = torch.ones_like(probe.present)
    with torch.no_grad():
        full = net.encode(probe.image, everything)
        net.decode(full)
        few = net.encode(probe.image, probe.present)
        for level, (shared, own) in enumerate(zip(full.features, few.features, strict=True)):
            flags = few.flags(level)
            deviation = difference(torch.where(flags, shared, 0.0), torch.where(flags, own, 0.0))
            expect(
                deviation <= TOLERANCE,
                f"latents of level {level} differ by {deviation:.1e} when other modalities are "
                "encoded too; set shares_encoding = False",
            )
        expected = net.decode(few).logits
        # Twice, since a cache may be spoilt by the first.
        for _ in range(2):
            deviation = difference(net.decode(full.restrict(probe.present)).logits, expected)
            expect(
                deviation <= TOLERANCE,
                f"hiding slots by restrict gives other logits (by {deviation:.1e}) than encoding "
                "fewer modalities; decode must mask by latents.usable, and latents.cache may "
                "hold only what depends on features alone",
            )


def _sizes(probe: Probe) -> None:
    stride = max(probe.net.strides)
    unit = stride * -(-4 // stride)
    image = probe.draw(2, [2 * unit, 3 * unit, 4 * unit])
    with torch.no_grad():
        out = probe.eval()(image, probe.present)
    _check_shapes(probe.net, out, image, probe.present)
