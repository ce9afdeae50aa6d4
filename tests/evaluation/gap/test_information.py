"""The two identities, and the numbers of the gap against closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, kl_divergence

from pmixseg.evaluation.gap.information import jensen_shannon, total_correlation


def random_covariance(k, generator):
    a = torch.randn(k, k, generator=generator, dtype=torch.float64)
    return a @ a.T + 0.3 * torch.eye(k, dtype=torch.float64)


def gaussian_divergence(mean, covariance, mean_p, covariance_p):
    """KL of two Gaussians with full covariances, by torch in float64."""
    q = MultivariateNormal(mean.double(), covariance.double())
    return kl_divergence(q, MultivariateNormal(mean_p.double(), covariance_p.double())).item()


def test_total_correlation_of_two_correlated_numbers():
    # -½ ln(1 - ρ²)
    covariance = torch.tensor([[2.0, 0.6 * math.sqrt(6)], [0.6 * math.sqrt(6), 3.0]])
    assert total_correlation(covariance, [1, 1]) == pytest.approx(-0.5 * math.log(0.64), rel=1e-6)
    assert total_correlation(torch.eye(4), [2, 2]) == 0.0


def chain_rule(mean, covariance, modalities, mean_p, covariance_p):
    """KL of the joint from P for every modality, and the sum of each one's own."""
    k = len(mean_p)
    own = [slice(m * k, (m + 1) * k) for m in range(modalities)]
    joint_p = torch.block_diag(*[covariance_p] * modalities)
    joint = gaussian_divergence(mean, covariance, mean_p.repeat(modalities), joint_p)
    return joint, sum(
        gaussian_divergence(mean[s], covariance[s, s], mean_p, covariance_p) for s in own
    )


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=30)
def test_identity_1_chain_rule(modalities, k, seed):
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(modalities * k, generator=g, dtype=torch.float64)
    covariance = random_covariance(modalities * k, g)
    mean_p = torch.randn(k, generator=g, dtype=torch.float64)
    joint, individual = chain_rule(mean, covariance, modalities, mean_p, random_covariance(k, g))
    correlation = total_correlation(covariance, [k] * modalities)
    assert joint == pytest.approx(individual + correlation, rel=1e-8)
    assert correlation >= -1e-9  # so the individual bound is the tighter one


def test_identity_1_gain_vanishes_when_q_factorises():
    covariance = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    joint, individual = chain_rule(torch.ones(4), covariance, 4, torch.zeros(1), torch.eye(1))
    assert total_correlation(covariance, [1] * 4) == 0.0 and joint == pytest.approx(individual)


def scene(seed=0, modalities=3, k=2):
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(modalities, k, generator=g, dtype=torch.float64)
    covariances = torch.stack([random_covariance(k, g) for _ in range(modalities)])
    return means, covariances, torch.zeros(k).double(), random_covariance(k, g)


def compensation(means, covariances, mean_p, covariance_p, weights, samples=60_000):
    """Σ w KL(q ‖ P) in closed form, and KL(Σ w q ‖ P) by Monte Carlo with torch's densities."""
    individual = sum(
        w * gaussian_divergence(m, c, mean_p, covariance_p)
        for w, m, c in zip(weights, means, covariances, strict=True)
    )
    parts = [MultivariateNormal(m, c) for m, c in zip(means, covariances.double(), strict=True)]
    anchor = MultivariateNormal(mean_p.double(), covariance_p.double())
    torch.manual_seed(1)
    mixture = 0.0
    for w, part in zip(weights, parts, strict=True):
        x = part.sample((samples,))
        logs = [math.log(v) + q.log_prob(x) for v, q in zip(weights, parts, strict=True)]
        mixture += w * (torch.stack(logs).logsumexp(0) - anchor.log_prob(x)).mean().item()
    return individual, mixture


@pytest.mark.parametrize("weights", [[1 / 3] * 3, [0.6, 0.3, 0.1]])
def test_identity_2_compensation(weights):
    means, covariances, *anchor = scene()
    individual, mixture = compensation(means, covariances, *anchor, weights)
    apart = jensen_shannon(means, covariances, weights, samples=60_000)
    assert individual == pytest.approx(mixture + apart, abs=0.03)
    assert apart > 0.2 and mixture > 0.2


def test_identity_2_mixture_may_fit_while_the_gap_stays():
    """Two narrow Gaussians whose mixture has the anchor's moments: JSD near ln 2 remains."""
    means = torch.tensor([[-0.995], [0.995]], dtype=torch.float64)
    covariances = torch.full((2, 1, 1), 0.01, dtype=torch.float64)
    apart = jensen_shannon(means, covariances)
    assert apart == pytest.approx(math.log(2), abs=1e-6)
    anchor = torch.zeros(1), torch.eye(1)
    individual, mixture = compensation(means, covariances, *anchor, [0.5, 0.5])
    # ½ (0.01 + 0.990025 - 1 - ln 0.01) = 2.3026, of which only the mixture's part depends on P.
    assert individual == pytest.approx(0.5 * math.log(100), abs=1e-3)
    assert mixture == pytest.approx(individual - math.log(2), abs=0.01)


def test_the_mixture_is_the_best_anchor():
    """Σ w KL(q_m ‖ P) is smallest, among Gaussians P, at the moments of the mixture."""
    means, covariances, _, _ = scene()

    def individual(mean_p, covariance_p):
        return sum(
            gaussian_divergence(m, c, mean_p, covariance_p) / 3
            for m, c in zip(means, covariances, strict=True)
        )

    centre = means.mean(0)
    shifts = means - centre
    matched = covariances.mean(0) + shifts.T @ shifts / 3
    best = individual(centre, matched)
    g = torch.Generator().manual_seed(1)
    for _ in range(20):
        other = random_covariance(2, g)
        near = matched + 0.1 * other
        assert individual(centre, near) > best and individual(centre + 0.1, matched) > best
    assert individual(torch.zeros(2), torch.eye(2)) > best  # N(0, I) among them
    assert individual(means[0], covariances[0]) > best  # and a single modality


def test_jensen_shannon_is_bounded_symmetric_and_zero_for_equals():
    means, covariances, _, _ = scene()
    same = jensen_shannon(means[:1].repeat(3, 1), covariances[:1].repeat(3, 1, 1))
    assert same == pytest.approx(0.0, abs=1e-12)
    far = jensen_shannon(means * 1000, covariances, [0.5, 0.25, 0.25])
    assert far == pytest.approx(1.5 * math.log(2), abs=1e-9)  # the entropy of the weights
    # By quadrature, in one dimension.
    x = torch.linspace(-30, 30, 200_001, dtype=torch.float64)
    q = [torch.distributions.Normal(m, s).log_prob(x) for m, s in ((0.0, 1.0), (2.0, 3.0))]
    mixed = torch.logsumexp(torch.stack(q), 0) - math.log(2)
    expected = sum(torch.trapezoid(p.exp() * (p - mixed), x).item() for p in q) / 2
    pair = torch.tensor([[0.0], [2.0]]), torch.tensor([[[1.0]], [[9.0]]])
    assert jensen_shannon(*pair, samples=200_000) == pytest.approx(expected, abs=3e-3)
