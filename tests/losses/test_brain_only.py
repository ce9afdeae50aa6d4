"""Every distance looks at brain voxels alone, and hidden latents are moved by no denominator."""

import pytest
import torch

from pmixseg.losses.alignment import AlignmentLoss
from pmixseg.losses.distances import DISTANCES
from pmixseg.types import Latents
from tests.losses.scenes import NAMES, anchor_for, flags

PLACES = [name for name in DISTANCES if name not in ("mmd", "sliced_wasserstein", "case_nce")]
"""Distances that do not draw voxels: their value does not depend on where the brain lies."""


def loss_of(name, features, brain, present=None, acquired=None, **kwargs):
    b, m, c = features.shape[:3]
    every = torch.ones(b, m, dtype=torch.bool)
    acquired = every if acquired is None else acquired
    latents = Latents([features], NAMES[:m], [acquired], brain=[brain])
    alignment = AlignmentLoss(name, [c], NAMES[:m], [0], **kwargs).to(features.dtype)
    shown = acquired if present is None else present
    return alignment(latents, anchor_for(name, m).to(features.dtype), shown, acquired)


def scene(share=0.3, samples=3, side=6):
    """Random latents; every sample has brain in the first slices, the rest is background."""
    torch.manual_seed(0)
    features = torch.randn(samples, 4, 3, side, side, side, dtype=torch.float64)
    brain = torch.zeros(samples, side, side, side, dtype=torch.bool)
    brain.view(samples, -1)[:, : int(share * side**3)] = True
    return features, brain


@pytest.mark.parametrize("name", DISTANCES)
def test_background_is_never_read(name):
    features, brain = scene(0.3)  # 70 % background
    value = loss_of(name, features, brain)
    rubbish = torch.where(brain[:, None, None], features, 1e3 * torch.randn_like(features))
    torch.testing.assert_close(loss_of(name, rubbish, brain), value, rtol=1e-9, atol=1e-12)
    if name != "vid":  # a constant on complete samples
        assert value.item() != pytest.approx(loss_of(name, features, brain | True).item(), rel=1e-3)
    leaf = features.clone().requires_grad_()
    loss_of(name, leaf, brain, detach="none").backward()
    assert (leaf.grad.masked_select(~brain[:, None, None]) == 0).all()


@pytest.mark.parametrize("name", PLACES)
def test_the_value_does_not_depend_on_how_much_background_there_is(name):
    features, brain = scene(0.3)
    cut = features.flatten(3)[..., :64].unflatten(3, (4, 4, 4))
    alone = loss_of(name, cut, torch.ones(3, 4, 4, 4, dtype=torch.bool))
    torch.testing.assert_close(loss_of(name, features, brain), alone, rtol=1e-9, atol=1e-12)
    wide = torch.nn.functional.pad(features, (0, 6) * 3)
    torch.testing.assert_close(
        loss_of(name, wide, torch.nn.functional.pad(brain, (0, 6) * 3)), alone, rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("name", DISTANCES)
def test_a_sample_without_brain_contributes_nothing(name):
    features, brain = scene(0.5)
    brain[1] = False
    both = loss_of(name, features[:2], brain[:2])
    if name == "case_nce":
        assert both.item() == 0  # no other patient is left to be told apart from
    else:
        alone = loss_of(name, features[:1], brain[:1])
        torch.testing.assert_close(both, alone / 2, rtol=1e-9, atol=1e-12)
    leaf = features.clone().requires_grad_()
    loss_of(name, leaf, torch.zeros_like(brain), detach="none").backward()
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def leaf_of(name):
    """Latents of which some are hidden, with the gradient of a distance; and which are shown."""
    features, brain = scene(0.6)
    shown = flags([1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1])
    leaf = features.clone().requires_grad_()
    loss_of(name, leaf, brain, present=shown).backward()
    return leaf, shown


@pytest.mark.parametrize("name", DISTANCES)
def test_hidden_latents_get_no_gradient_through_a_denominator(name):
    leaf, shown = leaf_of(name)
    assert (leaf.grad[~shown] == 0).all()
    assert (leaf.grad[shown] != 0).any()


@pytest.mark.parametrize("name", ["nmse", "smooth_l1", "cosine", "whitened"])
def test_no_gradient_points_along_the_scale_of_the_shown(name):
    leaf, shown = leaf_of(name)
    along = (leaf.grad * leaf)[shown].sum().abs()
    bound = (leaf.grad * leaf)[shown].abs().sum()
    assert along < 1e-4 * bound  # what ε and the shift leave


@pytest.mark.parametrize("name", DISTANCES)
def test_one_brain_voxel_is_enough(name):
    features, _ = scene()
    brain = torch.zeros(3, 6, 6, 6, dtype=torch.bool)
    brain[:, 2, 3, 4] = True
    leaf = features.clone().requires_grad_()
    value = loss_of(name, leaf, brain, detach="none")
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(leaf.grad).all()
