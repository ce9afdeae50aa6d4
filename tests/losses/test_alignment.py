"""The alignment loss: its sum over levels and sequences, invariances, gradients, options."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmixseg.describe import build, describe
from pmixseg.errors import InputError
from pmixseg.losses.alignment import AlignmentLoss, resolve_levels
from pmixseg.losses.anchors import (
    MixtureAnchor,
    ModalityAnchor,
    NormalAnchor,
    ProductAnchor,
)
from pmixseg.losses.distances import DISTANCES, NMSE
from pmixseg.slot_sums import weighted_sum
from tests.losses.scenes import NAMES, align, anchor_for, bound, flags, latents_of, values


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))
@settings(max_examples=40)
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
    actual = AlignmentLoss("nmse", [2, 3], NAMES[:m], [0, 1])(latents, anchor, present, acquired)
    expected = torch.zeros(())
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
                expected += ((f[i, j] - p) ** 2).mean() / 2 / denominator / len(a) / b
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-6)


def test_levels_are_summed_and_can_be_negative():
    fs = [torch.randn(1, 4, c, 1, 1, 2) for c in (1, 2, 3)]
    anchor = bound(MixtureAnchor("uniform"), NAMES, 3)
    every = flags([1, 1, 1, 1])
    alignment = AlignmentLoss("mse", [1, 2, 3], NAMES, [-1, -3])
    parts = alignment.per_level(latents_of(fs), anchor, every, every)
    assert list(parts) == [0, 2]
    assert alignment(latents_of(fs), anchor, every, every) == sum(parts.values())
    assert resolve_levels((2, 0), 3) == (0, 2)
    for levels in ([], [3], [-4], [0, -3]):
        with pytest.raises(InputError, match="levels"):
            AlignmentLoss("mse", [1, 2, 3], NAMES, levels)


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
@settings(max_examples=20)
def test_nmse_to_a_uniform_mixture_is_at_most_one_half(seed, m):
    torch.manual_seed(seed)
    f = torch.randn(2, m, 2, 1, 2, 2) + 3 * torch.randn(1, m, 2, 1, 1, 1)
    assert 0 <= align(f, "nmse").item() <= 0.5


def test_no_gradient_reaches_w_and_none_would_at_uniform_w():
    """docs/method/anchors.md: with equal terms, w = 1/M is stationary even if w is not detached."""
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
    expected = {"none": [-1.5, 1.5], "anchor": [0.0, 1.5], "features": [-1.5, 0.0]}[detach]
    assert f.grad.flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", [name for name in DISTANCES if name != "mmd"])
def test_gradients_are_right(name):
    torch.manual_seed(0)
    f = torch.randn(2, 3, 2, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    # Statistics give hidden latents no gradient (see below), which finite differences would see.
    subset = shown = flags([1, 1, 0], [1, 1, 1])
    alignment = AlignmentLoss(name, [2], NAMES[:3], [0], "linear", detach="none").double()
    for p in alignment.parameters():
        torch.nn.init.normal_(p, 0.3, 0.3)
    anchor = anchor_for(name, 3).double()
    parameters = list(alignment.named_parameters())

    def loss(f, *arguments):
        replaced = {n: p for (n, _), p in zip(parameters, arguments, strict=True)}
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
        torch.Tensor,
        "nanmedian",
        lambda self, dim: Held(torch.full(self.shape[:dim], 2.0).to(self)),
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
    guarded = ("kl", "vid", "joint", "vic", "case_nce")
    if case in ("coincident", "constant", "zero") and name not in guarded:
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
    alignment = AlignmentLoss(name, [3], NAMES, [0], "linear", "none")
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
    alignment = AlignmentLoss(name, [3, 3], NAMES, [0, 1], "linear")
    f = [torch.randn(2, 4, 3, 2, 2, 2, requires_grad=True) for _ in range(2)]
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    anchor = bound(
        anchor_for(name).__class__() if name == "vid" else MixtureAnchor("uniform"), NAMES, 2
    )
    alignment(latents_of(f, nothing), anchor, nothing, nothing).backward()
    tensors = [*f, *alignment.parameters()]
    assert all(t.grad is not None and torch.isfinite(t.grad).all() for t in tensors)


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_are_in_float32_inside_autocast(name):
    f = torch.randn(2, 4, 3, 2, 2, 2)
    anchor = anchor_for(name)
    every = torch.ones(2, 4, dtype=torch.bool)
    alignment = AlignmentLoss(name, [3], NAMES, [0], "linear")
    expected = alignment(latents_of(f.bfloat16().float()), anchor, every, every)
    with torch.autocast("cpu", torch.bfloat16):
        actual = alignment(latents_of(f.bfloat16()), anchor, every, every)
    assert actual.dtype == torch.float32 and actual == expected


# Options --------------------------------------------------------------------------------------


def test_projections_start_as_the_identity_and_belong_to_a_modality():
    torch.manual_seed(0)
    f = torch.randn(2, 4, 3, 2, 2, 2)
    assert align(f, "nmse", projection="linear").item() == pytest.approx(align(f, "nmse").item())
    alignment = AlignmentLoss("mse", [3], NAMES, [0], "linear")
    weight = torch.nn.init.normal_(alignment.projections["0"].weight.data)
    actual = alignment(latents_of(f), anchor_for("mse"), *[torch.ones(2, 4, dtype=torch.bool)] * 2)
    convolved = [
        torch.nn.functional.conv3d(f[:, m], weight[m][..., None, None, None]) for m in range(4)
    ]
    assert actual.item() == pytest.approx(align(torch.stack(convolved, 1), "mse").item(), rel=1e-5)


def test_sampling_reparametrises_the_aligned_levels():
    fs = [torch.zeros(2, 4, 3, 8, 8, 8), torch.zeros(2, 4, 3, 8, 8, 8)]
    alignment = AlignmentLoss("kl", [3, 3], NAMES, [1])
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
        AlignmentLoss("mse", [3], NAMES, [0]).sample(latents)


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
        AlignmentLoss(
            **({"distance": "mse", "channels": [1], "modalities": NAMES, "levels": [0]} | arguments)
        )


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_can_be_described(name):
    again = build(describe(DISTANCES[name]()))
    assert type(again) is DISTANCES[name]
