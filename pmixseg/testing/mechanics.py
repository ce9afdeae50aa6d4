"""Rules about handling a backbone: saving, rebuilding, layouts, precision, compiling."""

from __future__ import annotations

import copy
import io

import torch
from torch import nn

from pmixseg.backbones.base import Backbone
from pmixseg.describe import build, describe
from pmixseg.testing.findings import TOLERANCE, difference, expect, first_few
from pmixseg.testing.probe import Probe


def _through_disk(value: object) -> object:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    loaded: object = torch.load(buffer, weights_only=True)
    return loaded


def _twin(net: Backbone) -> Backbone:
    """Return a second backbone with other weights, made from the description where there is one."""
    try:
        twin: Backbone = build(describe(net))
    except Exception:  # rule "description" reports it
        twin = copy.deepcopy(net)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            if tensor.is_floating_point():
                tensor.normal_()
    return twin


def state_dict(probe: Probe) -> None:
    """Check that a second network with the same state dict computes the same."""
    net = probe.eval()
    twin = _twin(net).to(probe.device).eval()
    twin.load_state_dict(_through_disk(net.state_dict()))  # type: ignore[arg-type]  # a dict went in
    expected = probe.logits(net, probe.image, probe.present)
    deviation = difference(probe.logits(twin, probe.image, probe.present), expected)
    expect(
        deviation <= TOLERANCE,
        f"a second network with the same state dict differs by {deviation:.1e}; a tensor is kept "
        "outside parameters and buffers",
    )


def description(probe: Probe) -> None:
    """Check that a network built from the description has equal attributes and parameters."""
    net = probe.net
    twin = build(_through_disk(describe(net)))
    for name in ("modalities", "num_classes", "channels", "strides", "slots", "shares_encoding"):
        ours, theirs = getattr(net, name), getattr(twin, name)
        expect(ours == theirs, f"built from its description, {name} is {theirs} and not {ours}")
    ours, theirs = ({k: v.shape for k, v in n.state_dict().items()} for n in (net, twin))
    expect(ours == theirs, "built from its description, the state dict has other names or shapes")


def channels_last(probe: Probe) -> None:
    """Check that the memory format changes nothing."""
    layout = torch.channels_last_3d
    net = probe.eval()
    expected = probe.logits(net, probe.image, probe.present)
    other = copy.deepcopy(net)
    nn.Module.to(other, memory_format=layout)  # type: ignore[call-overload]  # missing in torch's stub
    deviation = difference(
        probe.logits(other, probe.image.contiguous(memory_format=layout), probe.present), expected
    )
    expect(deviation <= TOLERANCE, f"in channels_last_3d the logits differ by {deviation:.1e}")


def bf16(probe: Probe) -> None:
    """Check that logits and gradients are finite under bf16 autocast."""
    net = copy.deepcopy(probe.net).train()
    # torch's CPU kernel leaves parts of a bf16 weight gradient unwritten where a 3x3x3 convolution
    # sees 2x2x2 voxels (torch 2.13, seen as NaN in half of the runs), so the lowest level gets 3.
    image = probe.draw(2, [max(3 * max(net.strides), side) for side in probe.size])
    with torch.autocast(probe.device.type, torch.bfloat16):
        out = net(image, probe.present)
    out.logits.float().square().mean().backward()  # type: ignore[no-untyped-call]  # untyped in torch
    expect(bool(out.logits.isfinite().all()), "under bf16 autocast the logits are not finite")
    wrong = [
        n for n, p in net.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
    ]
    expect(not wrong, f"under bf16 autocast the gradient of {first_few(wrong)} is not finite")


def compiled(probe: Probe, backend: bool | str) -> None:
    """Check that compiled ``encode`` and ``decode`` compute the same, if a ``backend`` is given."""
    if not backend:
        return
    net = probe.eval()
    expected = probe.logits(net, probe.image, probe.present)
    how = backend if isinstance(backend, str) else "inductor"
    torch.compiler.reset()
    encode, decode = torch.compile(net.encode, backend=how), torch.compile(net.decode, backend=how)
    with torch.no_grad():
        logits = decode(encode(probe.image, probe.present)).logits
    deviation = difference(logits, expected)
    expect(deviation <= TOLERANCE, f"compiled, the logits differ by {deviation:.1e}")
