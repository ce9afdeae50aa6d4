"""Gradients that oneDNN leaves unwritten in bf16: what is allocated shows what was there before."""

import pytest
import torch
from torch import nn

from pmixseg.backbones.layers.bf16_gradients import (
    convolve_wholly,
    misses_kernel,
    repair_gradients,
    zeros_around,
)
from pmixseg.backbones.layers.lean import LeanConv3d


def leave_infinities():
    """Gradients are allocated where these were."""
    junk = [torch.full((n,), float("inf")) for n in (1000, 32 * 32 * 27, 100_000)]
    del junk


def gradients(network, x, *, autocast):
    network.zero_grad()
    leaf = x.clone().requires_grad_()
    leave_infinities()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = network(leaf)
    y.float().square().sum().backward()
    return y, [leaf.grad, *(p.grad.clone() for p in network.parameters())]


def assert_close(actual, expected):
    for half, wide in zip(actual, expected, strict=True):
        assert half.dtype == wide.dtype
        assert (half - wide).abs().max() < 0.05 * wide.abs().max()


@pytest.mark.parametrize(
    ("depth", "arguments"),
    [
        (1, {"kernel_size": 3, "padding": 1}),
        (2, {"kernel_size": 3, "padding": 1}),
        (2, {"kernel_size": 3, "padding": "same", "bias": False}),
        (2, {"kernel_size": (3, 1, 1), "padding": (1, 0, 0), "stride": (1, 2, 2)}),
        (3, {"kernel_size": 3, "padding": 1}),
        (3, {"kernel_size": 5, "padding": 2, "stride": 2}),
        (4, {"kernel_size": 5, "padding": 2}),
        (2, {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"}),
        (4, {"kernel_size": 3, "padding": "valid"}),
    ],
)
def test_a_repaired_network_has_the_gradients_of_float32(depth, arguments):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(32, 32, **arguments))
    x = torch.randn(2, 32, depth, 3, 3)
    wide, expected = gradients(network, x, autocast=False)
    handles = repair_gradients(network)
    half, actual = gradients(network, x, autocast=True)
    assert half.dtype == torch.bfloat16
    assert (half - wide).abs().max() < 0.02 * wide.abs().max()
    assert_close(actual, expected)
    for handle in handles:
        handle.remove()
    assert not network[0]._forward_hooks


def test_models_wholly_in_bf16_keep_their_type():
    torch.manual_seed(0)
    network = nn.Conv3d(32, 32, 3, padding=1)
    x = torch.randn(2, 32, 2, 3, 3)
    _, expected = gradients(network, x, autocast=False)
    repair_gradients(network.bfloat16())
    y, actual = gradients(network, x.bfloat16(), autocast=False)
    assert y.dtype == torch.bfloat16
    assert_close([part.float() for part in actual], expected)


def test_inference_float32_and_deeper_volumes_are_computed_once(monkeypatch):
    calls = []
    original = nn.Conv3d._conv_forward

    def counted(self, *arguments):
        calls.append(arguments[0].dtype)
        return original(self, *arguments)

    monkeypatch.setattr(nn.Conv3d, "_conv_forward", counted)
    network = nn.Conv3d(4, 4, 3, padding=1)
    repair_gradients(network)
    shallow, deep = torch.randn(1, 4, 2, 3, 3), torch.randn(1, 4, 3, 3, 3)
    network(shallow)
    with torch.autocast("cpu", torch.bfloat16):
        network(deep)
        with torch.no_grad():
            network(shallow)
        assert len(calls) == 3
        network(shallow)
    assert calls[3:] == [torch.float32, torch.float32]


def test_what_is_padded_and_what_is_missed():
    def conv(**arguments):
        return nn.Conv3d(1, 1, 3, **arguments)

    assert [zeros_around(conv(padding=p)) for p in (0, 1, "same", "valid")] == [0, 1, 1, 0]
    assert zeros_around(conv(padding=1, padding_mode="reflect")) == 0
    half = torch.bfloat16
    assert [misses_kernel(half, depth, 3, 1) for depth in (1, 2, 3)] == [False, True, False]
    assert not misses_kernel(torch.float32, 2, 3, 1) and not misses_kernel(half, 2, 3, 0)


def test_layers_with_a_way_of_their_own_get_no_hook():
    network = nn.Sequential(LeanConv3d(4, 4, padding="zeros"), nn.Conv3d(4, 4, 1))
    assert repair_gradients(network) == []


@pytest.mark.slow
def test_compiled_lean_layers_have_the_same_gradients():
    torch.manual_seed(0)
    conv = LeanConv3d(32, 32, padding="zeros")
    x = torch.randn(2, 32, 2, 3, 3)
    _, expected = gradients(conv, x, autocast=False)
    compiled = torch.compile(conv)
    _, actual = gradients(compiled, x, autocast=True)
    assert_close(actual, expected)
    with torch.no_grad():
        torch.testing.assert_close(convolve_wholly(conv, x), conv(x))
