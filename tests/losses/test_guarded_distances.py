"""``whitened`` and ``vic``: golden numbers, slow references, and what each is for."""

import math

import pytest
import torch

from pmixseg.losses.distances import VIC, Whitened
from tests.losses.scenes import align, flags, values
from tests.losses.test_brain_only import loss_of

SUBSET = flags([1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 0])
SHOWN = flags([1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0])


def ragged():
    torch.manual_seed(0)
    features = torch.randn(3, 4, 3, 2, 2, 3, dtype=torch.float64)
    features[:, :, 1] += 0.7 * features[:, :, 0]
    return features, torch.rand(3, 2, 2, 3) < 0.7


def rows(features, brain, slots):
    """Brain vectors of some slots, ``[n, C]``, and the modality of each."""
    vectors, modality = [], []
    for i in range(len(features)):
        for m in range(features.shape[1]):
            if slots[i, m]:
                own = features[i, m].flatten(1)[:, brain[i].flatten()].T
                vectors.append(own)
                modality += [m] * len(own)
    return torch.cat(vectors), torch.tensor(modality)


def mean_of_slots(features, brain, value):
    """Mean over brain voxels of ``value(f - P)``, then over A, then over samples."""
    total = 0.0
    for i in range(len(features)):
        inside = brain[i].flatten()
        s = [m for m in range(4) if SUBSET[i, m]]
        target = features[i, s].flatten(2)[:, :, inside].mean(0)
        a = [m for m in range(4) if SHOWN[i, m]]
        for m in a:
            apart = features[i, m].flatten(1)[:, inside] - target
            total += torch.stack([value(x) for x in apart.T]).mean() / len(a) / len(features)
    return total


def test_whitened_by_hand():
    # One channel: the ratio of nmse, 1.25 / 3.5, but for the ridge.
    f = values([1.0, 2.0], [3.0, 6.0])
    assert align(f, Whitened(epsilon=1e-3)).item() == pytest.approx(1.25 / (3.5 * 1.001))
    # Two channels of which the second agrees: only the first counts, over C = 2.
    g = values([1.0, 2.0, 1.0, -1.0], [3.0, 6.0, 1.0, -1.0], channels=2)
    first, second = g.movedim(2, 0).flatten(1)
    total = torch.cov(torch.stack([first, second]), correction=0)
    apart = torch.tensor([[1.0, 0], [2.0, 0], [1.0, 0], [2.0, 0]], dtype=torch.float64)
    want = 0.5 * (torch.linalg.inv(total) @ (apart.T @ apart / 4)).trace() / 2
    assert align(g, Whitened(epsilon=0.0)).item() == pytest.approx(float(want), rel=1e-6)


def test_whitened_equals_a_loop_with_ragged_masks():
    features, brain = ragged()
    total = torch.cov(rows(features, brain, SUBSET)[0].T, correction=0)
    ridge = 0.01 * total.diagonal().mean() * torch.eye(3, dtype=torch.float64)
    inverse = torch.linalg.inv(total + ridge)
    want = mean_of_slots(features, brain, lambda x: 0.5 * x @ inverse @ x / 3)
    got = loss_of(Whitened(epsilon=0.01), features, brain, present=SHOWN, acquired=SUBSET)
    assert got.item() == pytest.approx(float(want), rel=1e-6)


def test_whitened_does_not_change_under_an_invertible_linear_map_where_nmse_does():
    torch.manual_seed(0)
    f = torch.randn(2, 4, 5, 3, 3, 3, dtype=torch.float64) + torch.randn(2, 1, 5, 3, 3, 3)
    f[:, :, 0] = 3 * torch.randn(2, 4, 3, 3, 3)  # the channel in which nothing agrees
    squeeze = torch.diag(torch.tensor([1e-2, 1, 1, 1, 1], dtype=torch.float64))
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    mapped = torch.einsum("dc,bmcxyz->bmdxyz", turn @ squeeze, f)
    whitened = Whitened(epsilon=0.0)
    assert align(mapped, whitened).item() == pytest.approx(align(f, whitened).item(), rel=1e-3)
    assert align(squeeze.diagonal().view(5, 1, 1, 1) * f, "nmse") < 0.7 * align(f, "nmse")


def test_no_gradient_of_whitened_points_along_a_linear_map_of_complete_samples():
    torch.manual_seed(0)
    f = torch.randn(2, 4, 3, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    align(f, Whitened(epsilon=0.0)).backward()
    along = torch.einsum("bmcxyz,bmdxyz->cd", f.grad, f.detach())
    assert along.abs().max() < 1e-6 * (f.grad * f).abs().sum()


def test_vic_by_hand():
    # Difference: mean (1, 4, 1, 4) = 2.5 over the variance 3.5. Within the modalities the variances
    # are ¼ and 2¼, together 1¼: a deviation above 1 costs nothing.
    f = values([1.0, 2.0], [3.0, 6.0])
    assert align(f, VIC(epsilon=0.0)).item() == pytest.approx(2.5 / 3.5)
    # A tenth of it: the same difference, and 1 - √(1.25)/10 for the deviation.
    want = 2.5 / 3.5 + 1 - math.sqrt(1.25) / 10
    assert align(0.1 * f, VIC(epsilon=0.0)).item() == pytest.approx(want)
    # Two equal channels: R = 1 twice, 4/C² · 2 = 2.
    twice = torch.cat([f, f], 2)
    assert align(twice, VIC(epsilon=0.0)).item() == pytest.approx(2.5 / 3.5 + 2)


def test_vic_equals_a_loop_with_ragged_masks():
    features, brain = ragged()
    features = 0.5 * features
    variance = rows(features, brain, SUBSET)[0].var(0, correction=0)
    want = mean_of_slots(features, brain, lambda x: (x.square() / variance).mean())
    vectors, modality = rows(features, brain, SHOWN)
    for m in range(4):
        if (modality == m).any():
            vectors[modality == m] -= vectors[modality == m].mean(0)
    covariance = vectors.T @ vectors / len(vectors)
    deviation = covariance.diagonal().sqrt()
    relation = covariance / deviation[:, None] / deviation
    guard = 4 / 9 * (relation - torch.diag(relation.diagonal())).square().sum()
    guard += (1 - deviation).clamp_min(0).mean()
    got = loss_of(VIC(epsilon=0.0), features, brain, present=SHOWN, acquired=SUBSET)
    assert got.item() == pytest.approx(float(want + guard), rel=1e-6)


def test_vic_pays_for_a_collapse_that_nmse_rewards():
    torch.manual_seed(0)
    code = torch.randn(2, 1, 1, 4, 4, 4)
    flat = code * torch.ones(2, 4, 6, 1, 1, 1) + 0.01 * torch.randn(2, 4, 6, 4, 4, 4)
    rich = torch.randn(2, 1, 6, 4, 4, 4) + torch.randn(2, 4, 6, 4, 4, 4)
    assert align(flat, "nmse") < 0.01 < align(rich, "nmse")
    assert align(flat, "vic") > 3 > align(rich, "vic")
    # It can be bought: different codes of the position keep it low, and hold no patient.
    bought = torch.randn(1, 1, 6, 4, 4, 4).expand(2, 4, 6, 4, 4, 4)
    assert align(bought, "vic") < 0.5
