"""The alignment loss: golden numbers, a slow reference, gradients, masks, invariances."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmixseg.describe import build, describe
from pmixseg.errors import InputError
from pmixseg.losses.alignment import DISTANCES, Alignment, resolve_levels
from pmixseg.losses.anchors import (
    MixtureAnchor,
    ModalityAnchor,
    NormalAnchor,
    ProductAnchor,
    weighted_sum,
)
from pmixseg.losses.distances import NMSE, Cosine, SmoothL1
from pmixseg.losses.gaussian import KL, VID, gaussian_kl, raw_of_unit_variance
from pmixseg.losses.samples import MMD, SlicedWasserstein
from pmixseg.types import Latents

NAMES = ("flair", "t1ce", "t1", "t2")


def flags(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def bound(anchor, modalities=NAMES, levels=1):
    anchor.bind(modalities[:], levels)
    return anchor


def latents_of(features, present=None, log_variance=None):
    features = features if isinstance(features, list) else [features]
    b, m = features[0].shape[:2]
    present = torch.ones(b, m, dtype=torch.bool) if present is None else present
    return Latents(features, NAMES[:m], [present] * len(features), log_variance)


def align(
    features, distance="mse", anchor=None, present=None, acquired=None, encoded=None, **kwargs
):
    """Loss of one level with everything acquired, shown and encoded unless told otherwise."""
    b, m, c = features.shape[:3]
    every = torch.ones(b, m, dtype=torch.bool)
    alignment = Alignment(distance, [c], NAMES[:m], [0], **kwargs).to(features.dtype)
    anchor = bound(anchor or MixtureAnchor("uniform"), NAMES[:m]).to(features.dtype)
    latents = latents_of(features, every if encoded is None else encoded)
    return alignment(
        latents,
        anchor,
        every if present is None else present,
        every if acquired is None else acquired,
    )


def values(*numbers, channels=1):
    """One sample, voxels along the last axis: ``values([m0v0, m0v1], [m1v0, m1v1])``."""
    return torch.tensor(numbers, dtype=torch.float64).reshape(1, len(numbers), channels, 1, 1, -1)


def anchor_for(name, m=4):
    return bound(NormalAnchor() if name == "vid" else MixtureAnchor("uniform"), NAMES[:m])


# Golden numbers -------------------------------------------------------------------------------


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
    want = sum(((f[:, m] - p[:, 0]) ** 2).mean() for m in range(4)) / 8
    assert align(f).item() == pytest.approx(want.item())


def test_nmse_by_hand():
    # Values 1, 2, 3, 6: mean 3, population variance (4 + 1 + 0 + 9)/4 = 3.5; mse part 1.25.
    f = values([1.0, 2.0], [3.0, 6.0])
    assert align(f, NMSE(epsilon=0.0)).item() == pytest.approx(1.25 / 3.5)
    # A second sample that is not in A (nothing shown is impossible; show one): its term is 0,
    # but its two latents enter the variance. Values 1 2 3 6 | 0 0 0 4: mean 2, variance
    # (1 + 0 + 1 + 16 + 4 + 4 + 4 + 4)/8 = 4.25. Sample 2: A = {t1ce}, P = (0, 2), D = ½·(0 + 4)/2.
    both = torch.cat([f, values([0.0, 0.0], [0.0, 4.0])])
    got = align(both, NMSE(epsilon=0.0), present=flags([1, 1], [0, 1]))
    assert got.item() == pytest.approx((1.25 + 1.0) / 4.25 / 2)
    # Two channels: the denominator is the mean of the two variances.
    f = values([1.0, 2.0, 10.0, 10.0], [3.0, 6.0, 10.0, 10.0], channels=2)
    assert align(f, NMSE(epsilon=0.0)).item() == pytest.approx((1.25 / 2) / (3.5 / 2))


def test_smooth_l1_by_hand():
    # Mean 3, sd s = √3.5; P̂ - f̂ = ±1/s, ±2/s = 0.5345 (quadratic), 1.0690 (linear).
    s = math.sqrt(3.5)
    want = (0.5 / s**2 + (2 / s - 0.5)) / 2
    f = values([1.0, 2.0], [3.0, 6.0])
    assert align(f, SmoothL1(epsilon=0.0)).item() == pytest.approx(want)


def test_cosine_by_hand():
    # Channels with mean 0 and variance 1 already: (1, 1), (-1, -1) | (1, -1), (-1, 1).
    # P = (1, 0), (-1, 0); cos = 1/√2 for every voxel and modality.
    f = values([1.0, -1.0, 1.0, -1.0], [1.0, -1.0, -1.0, 1.0], channels=2)
    assert align(f, Cosine(epsilon=1e-12)).item() == pytest.approx(1 - 1 / math.sqrt(2))


def test_kl_of_gaussians_by_hand():
    # KL(N(1, 2) ‖ N(3, 4)) = ½ (ln 2 + (2 + 4)/4 - 1)
    got = gaussian_kl(*map(torch.tensor, (1.0, math.log(2), 3.0, math.log(4))))
    assert got.item() == pytest.approx(0.5 * (math.log(2) + 0.5))


def test_kl_starts_as_unit_gaussians():
    f = values([1.0, 2.0], [3.0, 6.0])
    # N(f, 1) to N(0, 1): ½ f².
    assert align(f, "kl", NormalAnchor()).item() == pytest.approx(6.25)
    # To the moment-matched mixture: voxel 1: μ_P = 2, σ_P² = 1 + 1; voxel 2: μ_P = 4, σ_P² = 1 + 4.
    want = (
        0.5 * (math.log(2) + (1 + 1) / 2 - 1) + 0.5 * (math.log(5) + (1 + 4) / 5 - 1)
    ) / 2  # the same for both modalities
    assert align(f, "kl").item() == pytest.approx(want)
    # Product with the prior: precision 3, μ_P = (1 + 3)/3 and 8/3.
    terms = [(x, y) for x, y in ((1, 4 / 3), (3, 4 / 3), (2, 8 / 3), (6, 8 / 3))]
    want = sum(0.5 * (-math.log(3) + 3 * (1 + (x - y) ** 2) - 1) for x, y in terms) / 4
    assert align(f, "kl", ProductAnchor()).item() == pytest.approx(want)


@pytest.mark.parametrize("raw", [-1e4, 1e4])
def test_kl_heads_keep_the_log_variance_within_six(raw):
    distance = KL()
    alignment = Alignment(distance, [1], NAMES[:1], [0])
    distance.log_variances["0"].bias.data.fill_(raw)
    every = flags([1])
    got = alignment(latents_of(values([2.0])), bound(NormalAnchor(), NAMES[:1]), every, every)
    log_variance = math.copysign(6, raw)
    assert got.item() == pytest.approx(0.5 * (math.exp(log_variance) + 4 - 1 - log_variance))


def test_kl_reads_variational_encoders():
    f, lv = values([1.0], [3.0]), values([math.log(2.0)], [40.0])
    latents = latents_of(f, log_variance=[lv])
    every = flags([1, 1])
    alignment = Alignment(KL(heads=False), [1], NAMES[:2], [0])
    got = alignment(latents, bound(NormalAnchor(), NAMES[:2]), every, every)
    # log σ² = 40 is clamped to 6.
    want = (0.5 * (-math.log(2) + 2 + 1 - 1) + 0.5 * (-6 + math.exp(6) + 9 - 1)) / 2
    assert got.item() == pytest.approx(want) and not list(alignment.parameters())
    with pytest.raises(InputError, match="log-variance"):
        align(f, KL(heads=False))


def test_vid_by_hand():
    f = values([1.0, 2.0], [3.0, 6.0])
    raw = VID(standardised=False)
    # σ² = 1, μ = 0: ½ mean f² = ½·50/4.
    assert align(f, raw, NormalAnchor()).item() == pytest.approx(6.25)
    # σ² = softplus(0) + 0.01, μ = 2.
    alignment = Alignment(raw, [1], NAMES[:2], [0])
    raw.means["0"].data.fill_(2.0), raw.raw_variances["0"].data.fill_(0.0)
    variance = math.log(2) + 0.01
    want = 0.5 * ((1 + 0 + 1 + 16) / 4 / variance + math.log(variance))
    every = flags([1, 1])
    got = alignment(latents_of(f), bound(NormalAnchor(), NAMES[:2]), every, every)
    assert got.item() == pytest.approx(want)
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
        got = align(f, distance, anchor=ModalityAnchor("flair")).item()
        assert got == pytest.approx(0.0, abs=1e-12)


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


# The sum --------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_alignment_equals_a_loop(m, b, seed):
    """L = Σ_l mean_b (1/|A|) Σ_{m∈A} D, with A and S different per sample."""
    torch.manual_seed(seed)
    fs = [torch.randn(b, m, 2, 2, 2, 2), torch.randn(b, m, 3, 1, 1, 1)]
    acquired = torch.rand(b, m) < 0.7
    encoded = acquired & (torch.rand(b, m) < 0.8)
    present = acquired & (torch.rand(b, m) < 0.7)
    anchor = bound(MixtureAnchor(), NAMES[:m], 2)
    torch.nn.init.normal_(anchor.scores)
    dirty = [torch.where(encoded[:, :, None, None, None, None], f, torch.nan) for f in fs]
    latents = latents_of(dirty, encoded)
    got = Alignment("nmse", [2, 3], NAMES[:m], [0, 1])(latents, anchor, present, acquired)
    want = torch.zeros(())
    for level, f in enumerate(fs):
        cells = [f[i, j].flatten(1) for i in range(b) for j in range(m) if encoded[i, j]]
        if not cells:
            continue
        denominator = torch.cat(cells, 1).var(1, correction=0).mean() + 1e-5
        w = anchor.scores.detach().view(2, m)[level].exp()
        for i in range(b):
            s = [j for j in range(m) if encoded[i, j]]
            a = [j for j in s if present[i, j]]
            p = sum(w[j] * f[i, j] for j in s) / sum(w[j] for j in s) if s else 0
            for j in a:
                want += ((f[i, j] - p) ** 2).mean() / 2 / denominator / len(a) / b
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)


def test_levels_are_summed_and_can_be_negative():
    fs = [torch.randn(1, 4, c, 1, 1, 2) for c in (1, 2, 3)]
    anchor = bound(MixtureAnchor("uniform"), NAMES, 3)
    every = flags([1, 1, 1, 1])
    alignment = Alignment("mse", [1, 2, 3], NAMES, [-1, -3])
    parts = alignment.per_level(latents_of(fs), anchor, every, every)
    assert list(parts) == [0, 2]
    assert alignment(latents_of(fs), anchor, every, every) == sum(parts.values())
    assert resolve_levels((2, 0), 3) == (0, 2)
    for levels in ([], [3], [-4], [0, -3]):
        with pytest.raises(InputError, match="levels"):
            Alignment("mse", [1, 2, 3], NAMES, levels)


# Invariances ----------------------------------------------------------------------------------


def test_nmse_does_not_change_with_scale_and_gives_no_gradient_along_it():
    f = torch.randn(2, 4, 3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    distance = NMSE(epsilon=0.0)
    for scale in (1e-4, 5.0, 1e4):
        assert align(scale * f, distance).item() == pytest.approx(align(f, distance).item())
    align(f, distance).backward()
    assert abs((f.grad * f).sum().item()) < 1e-12
    f.grad = None
    align(f, "mse").backward()
    assert (f.grad * f).sum().item() > 0.1  # mse pays for shrinking


@given(st.integers(0, 2**31), st.integers(2, 4))
@settings(max_examples=20, deadline=None)
def test_nmse_to_a_uniform_mixture_is_at_most_one_half(seed, m):
    torch.manual_seed(seed)
    f = torch.randn(2, m, 2, 1, 2, 2) + 3 * torch.randn(1, m, 2, 1, 1, 1)
    assert 0 <= align(f, "nmse").item() <= 0.5


def test_no_gradient_reaches_w_and_none_would_at_uniform_w():
    """METHOD.md section 1: with equal terms, w = 1/M is stationary even if w is not detached."""
    f = torch.randn(2, 4, 3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    anchor = MixtureAnchor()
    align(f, "mse", anchor, detach="none").backward()
    assert anchor.scores.grad is None

    def equal_terms(scores):
        w = scores.softmax(0).expand(2, 4)
        every = torch.ones(2, 4, dtype=torch.bool)
        p = weighted_sum(f.detach(), w, every)[:, None]
        return (f.detach() - p).square().mean()

    at_uniform = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(equal_terms(at_uniform), at_uniform)
    assert gradient.abs().max() < 1e-15
    elsewhere = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64, requires_grad=True)
    loss = equal_terms(elsewhere)
    (gradient,) = torch.autograd.grad(loss, elsewhere)
    assert gradient[0] > 1e-3 and loss > equal_terms(at_uniform)  # and uniform is the minimum


# Gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("detach", ["none", "anchor", "features"])
def test_detach_says_what_moves(detach):
    f = values([1.0], [4.0]).requires_grad_()
    align(f, "mse", ModalityAnchor("flair"), detach=detach).backward()
    # L = ½·½·(f₂ - f₁)²: dL/df₂ = (f₂ - f₁)/2 as latent, dL/df₁ = -(f₂ - f₁)/2 as anchor.
    want = {"none": [-1.5, 1.5], "anchor": [0.0, 1.5], "features": [-1.5, 0.0]}[detach]
    assert f.grad.flatten().tolist() == pytest.approx(want)


@pytest.mark.parametrize("name", [name for name in DISTANCES if name != "mmd"])
def test_gradients_are_right(name):
    torch.manual_seed(0)
    f = torch.randn(2, 3, 2, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    subset, shown = flags([1, 1, 0], [1, 1, 1]), flags([1, 0, 0], [1, 0, 1])
    alignment = Alignment(name, [2], NAMES[:3], [0], "linear", detach="none").double()
    for p in alignment.parameters():
        torch.nn.init.normal_(p, 0.3, 0.3)
    anchor = anchor_for(name, 3).double()
    parameters = list(alignment.named_parameters())

    def loss(f, *given):
        replaced = {n: p for (n, _), p in zip(parameters, given, strict=True)}
        return torch.func.functional_call(
            alignment, replaced, (latents_of(f, subset), anchor, shown, subset)
        )

    assert torch.autograd.gradcheck(loss, (f, *(p for _, p in parameters)))


def test_mmd_gradient_with_the_bandwidth_held(monkeypatch):
    """The median is detached: finite differences would see it move."""
    f = torch.randn(1, 2, 2, 1, 2, 3, dtype=torch.float64, requires_grad=True)

    class Held:
        def __init__(self, values):
            self.values = values

    monkeypatch.setattr(
        torch.Tensor, "median", lambda self, dim: Held(torch.full(self.shape[:dim], 2.0).to(self))
    )
    assert torch.autograd.gradcheck(lambda x: align(x, "mmd", detach="none"), f)


HARD = {
    "coincident": torch.randn(1, 1, 3, 2, 2, 2).expand(2, 4, 3, 2, 2, 2),
    "constant": torch.full((2, 4, 3, 2, 2, 2), 7.0),
    "zero": torch.zeros(2, 4, 3, 2, 2, 2),
    "one voxel": torch.randn(2, 4, 3, 1, 1, 1),
    "one voxel of one sample": torch.randn(1, 4, 3, 1, 1, 1),
    "large": 1e4 * torch.randn(2, 4, 3, 2, 2, 2),
    "tiny": 1e-6 * torch.randn(2, 4, 3, 2, 2, 2),
}


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("single", [False, True])
def test_gradients_are_finite_where_it_is_hard(name, case, single):
    f = HARD[case].clone().requires_grad_()
    b = f.shape[0]
    present = (
        flags([0, 1, 0, 0], [0, 0, 0, 1])[:b] if single else torch.ones(b, 4, dtype=torch.bool)
    )
    anchor = None if name != "vid" else NormalAnchor()
    loss = align(
        f, name, anchor, present=present, encoded=present, detach="none", projection="linear"
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(f.grad).all()
    if single and name in ("nmse", "mse", "smooth_l1", "cosine", "mmd", "sliced_wasserstein"):
        assert loss.item() == pytest.approx(0.0, abs=1e-6)  # the anchor over one latent is itself
    if case in ("coincident", "constant", "zero") and name not in ("kl", "vid", "joint"):
        assert loss.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", DISTANCES)
def test_hidden_slots_may_hold_anything(name):
    torch.manual_seed(0)
    acquired, encoded = (
        flags([1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]),
        flags([1, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 1]),
    )
    present = flags([1, 1, 0, 1], [0, 1, 1, 1], [0, 0, 1, 0])
    f = torch.randn(3, 4, 3, 2, 2, 2)
    alignment = Alignment(name, [3], NAMES, [0], "linear", "none")
    anchor = anchor_for(name)
    results = []
    for rubbish in (0.0, math.nan, math.inf):
        visible = encoded & acquired
        g = torch.where(visible[:, :, None, None, None, None], f, rubbish).requires_grad_()
        alignment.zero_grad()
        loss = alignment(latents_of(g, encoded), anchor, present, acquired)
        loss.backward()
        gradients = [g.grad, *(p.grad for p in alignment.parameters())]
        assert all(torch.isfinite(x).all() for x in gradients)
        assert (g.grad[~visible] == 0).all()
        results.append(torch.cat([loss.view(1), *(x.flatten() for x in gradients)]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", DISTANCES)
def test_every_parameter_is_in_the_graph_even_if_nothing_is_shown(name):
    alignment = Alignment(name, [3, 3], NAMES, [0, 1], "linear")
    f = [torch.randn(2, 4, 3, 2, 2, 2, requires_grad=True) for _ in range(2)]
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    anchor = bound(
        anchor_for(name).__class__() if name == "vid" else MixtureAnchor("uniform"), NAMES, 2
    )
    alignment(latents_of(f, nothing), anchor, nothing, nothing).backward()
    tensors = [*f, *alignment.parameters()]
    assert all(t.grad is not None and torch.isfinite(t.grad).all() for t in tensors)


@pytest.mark.parametrize("name", DISTANCES)
def test_float32_inside_autocast(name):
    f = torch.randn(2, 4, 3, 2, 2, 2)
    anchor = anchor_for(name)
    every = torch.ones(2, 4, dtype=torch.bool)
    alignment = Alignment(name, [3], NAMES, [0], "linear")
    want = alignment(latents_of(f.bfloat16().float()), anchor, every, every)
    with torch.autocast("cpu", torch.bfloat16):
        got = alignment(latents_of(f.bfloat16()), anchor, every, every)
    assert got.dtype == torch.float32 and got == want


# Options --------------------------------------------------------------------------------------


def test_projections_start_as_the_identity_and_belong_to_a_modality():
    torch.manual_seed(0)
    f = torch.randn(2, 4, 3, 2, 2, 2)
    assert align(f, "nmse", projection="linear").item() == pytest.approx(align(f, "nmse").item())
    alignment = Alignment("mse", [3], NAMES, [0], "linear")
    weight = torch.nn.init.normal_(alignment.projections["0"].weight.data)
    got = alignment(latents_of(f), anchor_for("mse"), *[torch.ones(2, 4, dtype=torch.bool)] * 2)
    convolved = [
        torch.nn.functional.conv3d(f[:, m], weight[m][..., None, None, None]) for m in range(4)
    ]
    assert got.item() == pytest.approx(align(torch.stack(convolved, 1), "mse").item(), rel=1e-5)


def test_sampling_reparametrises_the_aligned_levels():
    fs = [torch.zeros(2, 4, 3, 8, 8, 8), torch.zeros(2, 4, 3, 8, 8, 8)]
    alignment = Alignment("kl", [3, 3], NAMES, [1])
    latents = latents_of(fs)
    drawn = alignment.sample(latents, torch.Generator().manual_seed(0))
    assert drawn.features[0] is fs[0]
    assert drawn.features[1].std().item() == pytest.approx(1.0, abs=0.02)
    alignment.distance.log_variances["1"].bias.data.fill_(6 * math.atanh(math.log(4) / 6))
    drawn = alignment.sample(latents, torch.Generator().manual_seed(0))
    assert drawn.features[1].std().item() == pytest.approx(2.0, abs=0.04)
    drawn.features[1].sum().backward()
    assert alignment.distance.log_variances["1"].bias.grad.abs().max() > 0
    with pytest.raises(InputError, match="kl"):
        Alignment("mse", [3], NAMES, [0]).sample(latents)


@pytest.mark.parametrize(
    ("distance", "anchor", "match"),
    [
        ("vid", MixtureAnchor("uniform"), "NormalAnchor"),
        ("cosine", NormalAnchor(), "directions"),
        ("mse", ProductAnchor(), "kl"),
    ],
)
def test_meaningless_pairs_are_refused(distance, anchor, match):
    with pytest.raises(InputError, match=match):
        align(values([1.0], [2.0]), distance, anchor)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"distance": "l7"}, "no distance 'l7'"),
        ({"projection": "conv"}, "projection"),
        ({"detach": "w"}, "detach"),
    ],
)
def test_wrong_options_are_refused(arguments, match):
    with pytest.raises(InputError, match=match):
        Alignment(
            **({"distance": "mse", "channels": [1], "modalities": NAMES, "levels": [0]} | arguments)
        )


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_can_be_described(name):
    again = build(describe(DISTANCES[name]()))
    assert type(again) is DISTANCES[name]
