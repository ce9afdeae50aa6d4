"""The distances of the alignment: golden numbers, slow references, and what each is for."""

import math

import pytest
import torch

from pmixseg.callbacks.without_effect import BLIND_TO_SCALE
from pmixseg.errors import InputError
from pmixseg.gaussians import gaussian_kl
from pmixseg.losses.alignment import AlignmentLoss
from pmixseg.losses.anchors import (
    MixtureAnchor,
    ModalityAnchor,
    NormalAnchor,
    ProductAnchor,
)
from pmixseg.losses.distances import NMSE, VIC, Cosine, SmoothL1, Whitened
from pmixseg.losses.distances.gaussian import KL, VID, raw_of_unit_variance
from pmixseg.losses.distances.samples import MMD, SlicedWasserstein
from tests.losses.scenes import NAMES, align, bound, flags, latents_of, values
from tests.losses.test_brain_only import loss_of


def test_mse_by_hand():
    # P = (2, 4); flair ½·mean(1, 4), t1ce the same: mean over two of 1.25.
    f = values([1.0, 2.0], [3.0, 6.0])
    assert align(f).item() == pytest.approx(1.25)
    # To flair: ½·(0 + ½(4 + 16)/1...)/2: D = 0 and ½·10 = 5; mean 2.5.
    assert align(f, anchor=ModalityAnchor("flair")).item() == pytest.approx(2.5)
    # To N(0, I) as a point: ½·(1 + 4)/2 = 1.25 and ½·(9 + 36)/2 = 11.25; mean 6.25.
    assert align(f, anchor=NormalAnchor()).item() == pytest.approx(6.25)


def test_four_modalities_give_the_one_eighth_of_the_snippet():
    f = torch.randn(1, 4, 2, 2, 2, 2, dtype=torch.float64)
    p = f.mean(1, keepdim=True)
    expected = sum(((f[:, m] - p[:, 0]) ** 2).mean() for m in range(4)) / 8
    assert align(f).item() == pytest.approx(expected.item())


def test_nmse_by_hand():
    # Values 1, 2, 3, 6: mean 3, population variance (4 + 1 + 0 + 9)/4 = 3.5; mse part 1.25.
    f = values([1.0, 2.0], [3.0, 6.0])
    assert align(f, NMSE(epsilon=0.0)).item() == pytest.approx(1.25 / 3.5)
    # A second sample that is not in A (nothing shown is impossible; show one): its term is 0,
    # but its two latents enter the variance. Values 1 2 3 6 | 0 0 0 4: mean 2, variance
    # (1 + 0 + 1 + 16 + 4 + 4 + 4 + 4)/8 = 4.25. Sample 2: A = {t1ce}, P = (0, 2), D = ½·(0 + 4)/2.
    both = torch.cat([f, values([0.0, 0.0], [0.0, 4.0])])
    actual = align(both, NMSE(epsilon=0.0), present=flags([1, 1], [0, 1]))
    assert actual.item() == pytest.approx((1.25 + 1.0) / 4.25 / 2)
    # Two channels: the denominator is the mean of the two variances.
    f = values([1.0, 2.0, 10.0, 10.0], [3.0, 6.0, 10.0, 10.0], channels=2)
    assert align(f, NMSE(epsilon=0.0)).item() == pytest.approx((1.25 / 2) / (3.5 / 2))


def test_smooth_l1_by_hand():
    # Mean 3, sd s = √3.5; P̂ - f̂ = ±1/s, ±2/s = 0.5345 (quadratic), 1.0690 (linear).
    s = math.sqrt(3.5)
    expected = (0.5 / s**2 + (2 / s - 0.5)) / 2
    f = values([1.0, 2.0], [3.0, 6.0])
    assert align(f, SmoothL1(epsilon=0.0)).item() == pytest.approx(expected)


def test_cosine_by_hand():
    # Channels with mean 0 and variance 1 already: (1, 1), (-1, -1) | (1, -1), (-1, 1).
    # P = (1, 0), (-1, 0); cos = 1/√2 for every voxel and modality.
    f = values([1.0, -1.0, 1.0, -1.0], [1.0, -1.0, -1.0, 1.0], channels=2)
    assert align(f, Cosine(epsilon=1e-12)).item() == pytest.approx(1 - 1 / math.sqrt(2))


def test_kl_of_gaussians_by_hand():
    # KL(N(1, 2) ‖ N(3, 4)) = ½ (ln 2 + (2 + 4)/4 - 1)
    actual = gaussian_kl(*map(torch.tensor, (1.0, math.log(2), 3.0, math.log(4))))
    assert actual.item() == pytest.approx(0.5 * (math.log(2) + 0.5))


def test_kl_starts_as_unit_gaussians():
    f = values([1.0, 2.0], [3.0, 6.0])
    # N(f, 1) to N(0, 1): ½ f².
    assert align(f, "kl", NormalAnchor()).item() == pytest.approx(6.25)
    # To the moment-matched mixture: voxel 1: μ_P = 2, σ_P² = 1 + 1; voxel 2: μ_P = 4, σ_P² = 1 + 4.
    expected = (
        0.5 * (math.log(2) + (1 + 1) / 2 - 1) + 0.5 * (math.log(5) + (1 + 4) / 5 - 1)
    ) / 2  # the same for both modalities
    assert align(f, "kl").item() == pytest.approx(expected)
    # Product with the prior: precision 3, μ_P = (1 + 3)/3 and 8/3.
    terms = [(x, y) for x, y in ((1, 4 / 3), (3, 4 / 3), (2, 8 / 3), (6, 8 / 3))]
    expected = sum(0.5 * (-math.log(3) + 3 * (1 + (x - y) ** 2) - 1) for x, y in terms) / 4
    assert align(f, "kl", ProductAnchor()).item() == pytest.approx(expected)


@pytest.mark.parametrize("raw", [-1e4, 1e4])
def test_kl_heads_keep_the_log_variance_within_six(raw):
    distance = KL()
    alignment = AlignmentLoss(distance, [1], NAMES[:1], [0])
    distance.log_variances["0"].bias.data.fill_(raw)
    every = flags([1])
    actual = alignment(latents_of(values([2.0])), bound(NormalAnchor(), NAMES[:1]), every, every)
    log_variance = math.copysign(6, raw)
    assert actual.item() == pytest.approx(0.5 * (math.exp(log_variance) + 4 - 1 - log_variance))


@pytest.mark.parametrize("anchor", [MixtureAnchor(weights="uniform"), NormalAnchor()])
def test_kl_heads_alone_meet_the_loss_where_no_sample_is_decoded(anchor):
    """It is warned of: the latents stay where they are, and the loss is gone."""
    torch.manual_seed(0)
    frozen = torch.randn(2, 2, 3, 4, 4, 4) + torch.tensor([0.0, 4.0])[:, None, None, None, None]
    distance, every = KL(), flags([1, 1], [1, 1])
    alignment = AlignmentLoss(distance, [3], NAMES[:2], [0])
    to = bound(anchor, NAMES[:2])
    optimizer = torch.optim.Adam(alignment.parameters(), lr=0.05)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = alignment(latents_of(frozen), to, every, every)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.5
    assert losses[-1] < 0.02 * losses[0]


def test_kl_reads_variational_encoders():
    f, lv = values([1.0], [3.0]), values([math.log(2.0)], [40.0])
    latents = latents_of(f, log_variance=[lv])
    every = flags([1, 1])
    alignment = AlignmentLoss(KL(heads=False), [1], NAMES[:2], [0])
    actual = alignment(latents, bound(NormalAnchor(), NAMES[:2]), every, every)
    # log σ² = 40 is clamped to 6.
    expected = (0.5 * (-math.log(2) + 2 + 1 - 1) + 0.5 * (-6 + math.exp(6) + 9 - 1)) / 2
    assert actual.item() == pytest.approx(expected) and not list(alignment.parameters())
    with pytest.raises(InputError, match="log-variance"):
        align(f, KL(heads=False))


def test_vid_by_hand():
    f = values([1.0, 2.0], [3.0, 6.0])
    raw = VID(standardised=False)
    # σ² = 1, μ = 0: ½ mean f² = ½·50/4.
    assert align(f, raw, NormalAnchor()).item() == pytest.approx(6.25)
    # σ² = softplus(0) + 0.01, μ = 2.
    alignment = AlignmentLoss(raw, [1], NAMES[:2], [0])
    raw.means["0"].data.fill_(2.0), raw.raw_variances["0"].data.fill_(0.0)
    variance = math.log(2) + 0.01
    expected = 0.5 * ((1 + 0 + 1 + 16) / 4 / variance + math.log(variance))
    every = flags([1, 1])
    actual = alignment(latents_of(f), bound(NormalAnchor(), NAMES[:2]), every, every)
    assert actual.item() == pytest.approx(expected)
    assert raw_of_unit_variance() == pytest.approx(math.log(math.exp(0.99) - 1))


def test_standardised_vid_does_not_move_complete_samples():
    """The note in VID's docstring: its value is ½ and its gradient 0 there."""
    f = torch.randn(2, 4, 3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    loss = align(f, VID(epsilon=0.0), NormalAnchor())
    loss.backward()
    assert loss.item() == pytest.approx(0.5) and f.grad.abs().max() < 1e-12
    f.grad = None
    align(f, VID(), NormalAnchor(), present=flags([1, 0, 0, 0], [0, 1, 1, 0])).backward()
    assert f.grad.abs().max() > 1e-4


def test_to_a_normal_anchor_only_some_distances_see_the_scale():
    """It is warned of: with the mean at 0, no gradient along the deviations."""
    torch.manual_seed(0)
    f = 3 * torch.randn(2, 4, 3, 4, 4, 4, dtype=torch.float64)
    f = (f - f.mean((0, 1, 3, 4, 5), keepdim=True)).requires_grad_()
    blind = {distance.name for distance in BLIND_TO_SCALE}
    for name in ("mse", "kl", "mmd", "sliced_wasserstein", "joint", *blind):
        (slope,) = torch.autograd.grad(align(f, name, NormalAnchor()), f)
        along = (slope * f).sum().abs() / f.square().sum()
        assert (along < 1e-8) == (name in blind), name


def test_mmd_by_hand():
    # One voxel each: x = 1, y = 3 and x = 5, y = 3. d² = 4 = median, so k(x, y) is the mean of
    # e^(-1/s); k(x, x) = k(y, y) = 1.
    f = values([1.0], [5.0])
    k = sum(math.exp(-1 / s) for s in (0.25, 0.5, 1, 2, 4)) / 5
    assert align(f, "mmd").item() == pytest.approx(2 - 2 * k)


def test_mmd_gives_its_bandwidth_no_gradient():
    # As above; dD/dx = 2 · mean_s e^(-1/s)/(4 s) · 2 (x - y), halved by the mean over modalities.
    f = values([1.0], [5.0]).requires_grad_()
    align(f, "mmd").backward()
    slope = sum(math.exp(-1 / s) / (4 * s) for s in (0.25, 0.5, 1, 2, 4)) / 5
    assert f.grad.flatten().tolist() == pytest.approx([-4 * slope, 4 * slope])


def test_mmd_equals_a_loop_over_pairs():
    torch.manual_seed(0)
    f = torch.randn(2, 3, 4, 1, 2, 3, dtype=torch.float64)
    total = 0.0
    for b in range(2):
        y = f[b].mean(0).flatten(1).T
        for m in range(3):
            x = f[b, m].flatten(1).T
            d = torch.cdist(x, y) ** 2
            med = d.flatten().sort().values[(d.numel() - 1) // 2]
            for s in (0.25, 0.5, 1, 2, 4):
                k = [
                    torch.exp(-(torch.cdist(*p) ** 2) / (s * med)).mean()
                    for p in ((x, x), (y, y), (x, y))
                ]
                total += (k[0] + k[1] - 2 * k[2]) / 5 / 6
    assert align(f, "mmd").item() == pytest.approx(float(total))


def test_sliced_wasserstein_by_hand():
    # One channel: directions are ±1. x = (1, 5), y = (6, 3) → sorted (3, 6): (2² + 1²)/2.
    f = values([1.0, 5.0], [11.0, 1.0])
    one = align(f, SlicedWasserstein(), present=flags([1, 0]))
    assert one.item() == pytest.approx(2.5)


def test_sets_are_compared_whatever_the_order_of_voxels():
    f = torch.randn(1, 2, 3, 4, 4, 4, dtype=torch.float64)
    f[:, 1] = f[:, 0].flatten(2)[..., torch.randperm(64)].view(1, 3, 4, 4, 4)
    for distance in ("mmd", "sliced_wasserstein"):
        actual = align(f, distance, anchor=ModalityAnchor("flair")).item()
        assert actual == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("make", [MMD, SlicedWasserstein])
def test_sampled_voxels_are_few_reproducible_and_representative(make):
    torch.manual_seed(0)
    f = torch.randn(2, 2, 4, 10, 10, 10)
    f[:, 1] += 1
    some, again = align(f, make(points=500)), align(f, make(points=500))
    assert some == again
    assert some.item() == pytest.approx(align(f, make(points=1000)).item(), rel=0.1)
    assert align(f, make(points=500, seed=1)) != some


@pytest.mark.parametrize("make", [MMD, SlicedWasserstein])
def test_sampled_distances_draw_from_the_normal_anchor(make):
    torch.manual_seed(0)
    f = torch.randn(1, 1, 4, 10, 10, 10)
    near = align(f, make(points=1000), NormalAnchor()).item()
    assert near < 0.02 < align(f + 1, make(points=1000), NormalAnchor()).item()
    assert near < 0.02 < align(f * 0.3, make(points=1000), NormalAnchor()).item()


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
    expected = 0.5 * (torch.linalg.inv(total) @ (apart.T @ apart / 4)).trace() / 2
    assert align(g, Whitened(epsilon=0.0)).item() == pytest.approx(float(expected), rel=1e-6)


def test_whitened_equals_a_loop_with_ragged_masks():
    features, brain = ragged()
    total = torch.cov(rows(features, brain, SUBSET)[0].T, correction=0)
    ridge = 0.01 * total.diagonal().mean() * torch.eye(3, dtype=torch.float64)
    inverse = torch.linalg.inv(total + ridge)
    expected = mean_of_slots(features, brain, lambda x: 0.5 * x @ inverse @ x / 3)
    actual = loss_of(Whitened(epsilon=0.01), features, brain, present=SHOWN, acquired=SUBSET)
    assert actual.item() == pytest.approx(float(expected), rel=1e-6)


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
    expected = 2.5 / 3.5 + 1 - math.sqrt(1.25) / 10
    assert align(0.1 * f, VIC(epsilon=0.0)).item() == pytest.approx(expected)
    # Two equal channels: R = 1 twice, 4/C² · 2 = 2.
    twice = torch.cat([f, f], 2)
    assert align(twice, VIC(epsilon=0.0)).item() == pytest.approx(2.5 / 3.5 + 2)


def test_vic_equals_a_loop_with_ragged_masks():
    features, brain = ragged()
    features = 0.5 * features
    variance = rows(features, brain, SUBSET)[0].var(0, correction=0)
    expected = mean_of_slots(features, brain, lambda x: (x.square() / variance).mean())
    vectors, modality = rows(features, brain, SHOWN)
    for m in range(4):
        if (modality == m).any():
            vectors[modality == m] -= vectors[modality == m].mean(0)
    covariance = vectors.T @ vectors / len(vectors)
    deviation = covariance.diagonal().sqrt()
    relation = covariance / deviation[:, None] / deviation
    guard = 4 / 9 * (relation - torch.diag(relation.diagonal())).square().sum()
    guard += (1 - deviation).clamp_min(0).mean()
    actual = loss_of(VIC(epsilon=0.0), features, brain, present=SHOWN, acquired=SUBSET)
    assert actual.item() == pytest.approx(float(expected + guard), rel=1e-6)


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
