"""The joint Gaussian anchor: closed forms, identities, processes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, kl_divergence

from pmixseg.describe import build, describe
from pmixseg.errors import InputError
from pmixseg.gaussians import gaussian_kl
from pmixseg.losses.alignment import AlignmentLoss
from pmixseg.losses.anchors import MixtureAnchor, NormalAnchor
from pmixseg.losses.distances.joint import (
    SMALLEST_VARIANCE,
    JointKL,
    gaussian_divergences,
    slot_moments,
)
from pmixseg.types import Latents
from tests.processes import run_two

NAMES = ("flair", "t1ce", "t1", "t2", "pd", "adc")


def every(b, m):
    return torch.ones(b, m, dtype=torch.bool)


def dependence_of(covariance):
    """Total correlation of Gaussian scalars: ½ (Σ log Σ_mm - log det Σ)."""
    lower = torch.linalg.cholesky(covariance).diagonal(dim1=-2, dim2=-1)
    return (0.5 * covariance.diagonal(dim1=-2, dim2=-1).log() - lower.log()).sum(-1)


def joint(features, anchor=None, present=None, acquired=None, **options):
    b, m, c = features.shape[:3]
    anchor = anchor or MixtureAnchor("uniform")
    anchor.bind(NAMES[:m], 1)
    present = every(b, m) if present is None else present
    acquired = every(b, m) if acquired is None else acquired
    alignment = AlignmentLoss(JointKL(**options), [c], NAMES[:m], [0], detach="none")
    return alignment(Latents([features], NAMES[:m], [acquired]), anchor, present, acquired)


def correlated(b, m, c, rho, voxels=4000, seed=0):
    """Latents whose modalities have variance 1 and correlation ρ in every channel."""
    generator = torch.Generator().manual_seed(seed)
    matrix = (1 - rho) * torch.eye(m) + rho * torch.ones(m, m)
    noise = torch.randn(b, c, voxels, m, generator=generator)
    z = noise @ torch.linalg.cholesky(matrix).T
    return z.permute(0, 3, 1, 2).reshape(b, m, c, 1, 1, voxels).double()


def orthogonal(m, scale, shift):
    """One sample, one channel: modality k is ``shift_k + scale_k`` times the k-th Walsh row."""
    rows = torch.tensor(
        [[1, 1, -1, -1, 1, 1, -1, -1], [1, -1, 1, -1, 1, -1, 1, -1], [1, 1, 1, 1, -1, -1, -1, -1]],
        dtype=torch.float64,
    )[:m]
    z = rows * torch.tensor(scale).double()[:, None] + torch.tensor(shift).double()[:, None]
    return z.view(1, m, 1, 1, 1, 8)


def test_by_hand_for_two_modalities():
    # z = ±1 in both, equal in 6 of 8 voxels: variances 1, covariance ½, means 0. Anchor: N(0, 1)
    # with ρ = ¼. tr P⁻¹Σ = 2 (1 - ½·¼)/(1 - 1/16) = 28/15; log dets: ln(15/16) - ln(3/4).
    a = torch.tensor([1, 1, 1, 1, -1, -1, -1, -1.0])
    b = torch.tensor([1, 1, 1, -1, 1, -1, -1, -1.0])
    z = torch.stack([a, b]).double().view(1, 2, 1, 1, 1, 8)
    expected = 0.5 * (28 / 15 - 2 + math.log(15 / 16) - math.log(3 / 4)) / 2
    actual = joint(z, NormalAnchor(), correlation=0.25, ridge=1e-12)
    assert actual.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("anchor", [MixtureAnchor("uniform"), NormalAnchor()])
def test_independent_modalities_cost_what_the_factorised_loss_does(anchor):
    """Uncorrelated latents, ρ = 0: (1/|A|) Σ_m KL(N(μ_m, σ_m²) ‖ P)."""
    z = orthogonal(3, [1.0, 2.0, 0.5], [0.0, 1.0, -1.0])
    mean, variance = torch.tensor([0.0, 1.0, -1.0]).double(), torch.tensor([1.0, 4.0, 0.25])
    pooled = variance.mean() + mean.var(correction=0)
    variance = variance.double() + 1e-2 * pooled + SMALLEST_VARIANCE
    if isinstance(anchor, NormalAnchor):
        mean_p, variance_p = torch.tensor(0.0).double(), torch.tensor(1.0).double()
    else:
        mean_p = mean.mean()
        variance_p = (variance + (mean - mean_p) ** 2).mean()
    expected = gaussian_kl(mean, variance.log(), mean_p, variance_p.log()).mean()
    assert joint(z, anchor, correlation=0.0).item() == pytest.approx(expected.item(), rel=1e-9)


@given(st.integers(0, 100), st.integers(2, 6), st.floats(0, 0.95))
def test_identity_1_dependence_is_charged_as_total_correlation(seed, m, rho):
    """ρ = 0: the joint divergence is the factorised one plus TC, for every sample and channel."""
    z = correlated(2, m, 3, rho, voxels=50, seed=seed) + torch.arange(m).view(1, m, 1, 1, 1, 1)
    mean, covariance = slot_moments(z, every(2, m), 1e-2, torch.ones_like(z[:, 0, 0]) > 0)
    variance = covariance.diagonal(dim1=-2, dim2=-1).mT
    mean_p = mean.mean(1, keepdim=True)
    variance_p = (variance + (mean - mean_p) ** 2).mean(1, keepdim=True)
    individual = gaussian_kl(mean, variance.log(), mean_p, variance_p.log()).sum(1)
    dependence = dependence_of(covariance)
    assert (dependence > -1e-12).all()
    expected = ((individual + dependence) / m).mean()
    assert joint(z, correlation=0.0).item() == pytest.approx(expected.item(), rel=1e-8)


def test_closed_form_equals_torch():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 5, 4, 4, generator=generator, dtype=torch.float64)
    covariances = root @ root.mT + torch.eye(4)
    shift = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    actual = gaussian_divergences(shift, covariances[0], covariances[1])
    for k in range(5):
        q = MultivariateNormal(shift[k], covariances[0, k])
        p = MultivariateNormal(torch.zeros_like(shift[k]), covariances[1, k])
        assert actual[k].item() == pytest.approx(kl_divergence(q, p).item())


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.8])
def test_latents_as_dependent_as_the_anchor_cost_nothing_and_others_do(rho):
    values = {
        r: joint(correlated(1, 4, 4, r), correlation=rho, ridge=1e-6).item()
        for r in (0.0, 0.3, 0.8)
    }
    assert min(values, key=values.get) == rho
    assert values[rho] < 2e-3
    assert all(v > 0.02 for r, v in values.items() if r != rho)


def test_descent_brings_the_modalities_to_the_anchor_s_correlation():
    z = correlated(1, 3, 2, 0.0, voxels=200).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        joint(z, correlation=0.8).backward()
        optimizer.step()
    correlations = torch.corrcoef(z.detach()[0, :, 0].flatten(1))
    off = correlations[~torch.eye(3, dtype=torch.bool)]
    assert off.min() > 0.7 and off.max() < 0.9
    assert z.var() > 0.5  # nothing shrank


def test_scale_changes_nothing():
    z = correlated(2, 3, 2, 0.4, voxels=60)
    assert joint(10 * z).item() == pytest.approx(joint(z).item(), rel=1e-4)


def test_matched_takes_the_cohort_s_dependence_and_gives_it_no_gradient():
    z = correlated(2, 4, 8, 0.6, voxels=3000)
    assert joint(z, correlation="matched").item() < 2e-3
    assert joint(z, correlation=0.0).item() > 0.1
    # Two pairs that differ: one equal correlation cannot fit them, the matched matrix can.
    pairs = torch.cat([correlated(2, 2, 8, 0.9), correlated(2, 2, 8, 0.9, seed=1)], 1)
    matched = joint(pairs, correlation="matched").item()
    assert all(joint(pairs, correlation=r).item() > 5 * matched for r in (0.0, 0.3, 0.6, 0.9))


def test_matched_with_modalities_missing_is_a_correlation_matrix():
    torch.manual_seed(0)
    z = torch.randn(3, 3, 2, 2, 2, 2)
    acquired = torch.tensor([[True, True, False], [False, True, True], [True, False, True]])
    term = JointKL("matched")
    shown = z * acquired[:, :, None, None, None, None]
    _, covariance = slot_moments(shown, acquired, 1e-2, torch.ones(3, 2, 2, 2) > 0)
    matrix = term._correlations(covariance, acquired)
    assert torch.allclose(matrix.diagonal(), torch.ones(3))
    assert (torch.linalg.eigvalsh(matrix) > 0).all()
    assert torch.isfinite(joint(z, present=acquired, acquired=acquired, correlation="matched"))


def test_samples_with_one_modality_or_different_ones():
    z = correlated(2, 4, 2, 0.5, voxels=100)
    present = torch.tensor([[True, False, False, False], [True, True, False, True]])
    both = joint(z, present=present, acquired=present, correlation=0.5)
    alone = joint(z[:1, :1], correlation=0.5)  # one modality: KL of its Gaussian to itself
    assert alone.item() == pytest.approx(0.0, abs=1e-9)
    three = joint(z[1:, [0, 1, 3]], correlation=0.5)
    assert both.item() == pytest.approx((alone.item() + three.item()) / 2)


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_gradients_are_right(correlation):
    torch.manual_seed(0)
    z = torch.randn(2, 3, 2, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    shown = torch.tensor([[True, True, False], [True, True, True]])
    assert torch.autograd.gradcheck(
        lambda x: joint(x, present=shown, acquired=shown, correlation=correlation), z
    )


@pytest.mark.parametrize("options", [{"correlation": 1.0}, {"correlation": -0.1}, {"ridge": 0.0}])
def test_what_is_out_of_range_is_refused(options):
    with pytest.raises(InputError, match="JointKL"):
        JointKL(**options)
    with pytest.raises(InputError, match="JointKL"):
        JointKL("learned")


def test_the_joint_distance_is_described_and_built_again():
    again = build(describe(JointKL("matched", 0.1)))
    assert (again.correlation, again.ridge) == ("matched", 0.1)


def _rank(rank, world, path, z):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}/init", rank=rank, world_size=world
    )
    mine = z[rank::world].clone().requires_grad_()
    loss = joint(mine, correlation="matched")
    loss.backward()
    torch.save((loss.detach(), mine.grad / world), f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_equal_one(tmp_path):
    z = correlated(4, 3, 2, 0.5, voxels=20)
    whole = z.clone().requires_grad_()
    loss = joint(whole, correlation="matched")
    loss.backward()
    run_two(_rank, 2, str(tmp_path), z)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert sum(v for v, _ in ranks).item() / 2 == pytest.approx(loss.item())
    for rank, (_, gradient) in enumerate(ranks):
        torch.testing.assert_close(gradient, whole.grad[rank::2])
