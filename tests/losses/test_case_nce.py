"""``case_nce``: golden numbers, a slow reference, and what it is for."""

import math

import pytest
import torch

from pmixseg.errors import InputError
from pmixseg.losses.anchors import MixtureAnchor, NormalAnchor
from pmixseg.losses.distances import MSE, CaseNCE
from tests.losses.scenes import NAMES, align, bound, flags
from tests.losses.test_brain_only import loss_of


def samples(*rows):
    """One voxel and one channel: a row of modalities for each sample."""
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), -1, 1, 1, 1, 1)


def exact(**options):
    return CaseNCE(**({"epsilon": 1e-12, "temperature": 1.0} | options))


def test_two_patients_by_hand():
    # Mean 0, so r = f and unit vectors are signs. Both sequences of a patient agree: each has
    # its anchor, the other sequence, at cosine 1 and the other patient's at -1.
    agree = align(samples([2, 4], [-2, -4]), exact())
    assert agree.item() == pytest.approx(math.log(1 + math.exp(-2)) / math.log(2))
    # They disagree: the anchor is at -1, and the other patient's at 1.
    disagree = align(samples([2, -4], [-2, 4]), exact())
    assert disagree.item() == pytest.approx(math.log(1 + math.exp(2)) / math.log(2))
    # With m in the anchor, the larger latent agrees with the mean, whatever the other says.
    leaking = align(samples([2, -4], [-2, 4]), exact(leave_out=False))
    expected = (math.log(1 + math.exp(2)) + math.log(1 + math.exp(-2))) / 2 / math.log(2)
    assert leaking.item() == pytest.approx(expected)
    # A temperature divides the cosines; scale and offset of the latents change nothing.
    colder = align(7 + 3 * samples([2, 4], [-2, -4]), exact(temperature=0.5))
    assert colder.item() == pytest.approx(math.log(1 + math.exp(-4)) / math.log(2))


def reference(features, brain, shown, subset, temperature, leave_out):
    """The docstring, voxel by voxel."""
    b, m = features.shape[:2]
    flat, inside = features.flatten(3), brain.flatten(1)
    patients = (inside & subset.any(1, keepdim=True)).sum(0)
    counted = [v for v in range(flat.shape[3]) if patients[v] > 1]
    cells = [(i, v) for v in counted for i in range(b) if inside[i, v]]
    r = {}
    for v in counted:
        here = [flat[i, j, :, v] for i in range(b) for j in range(m) if inside[i, v] & subset[i, j]]
        for i, u in cells:
            for j in range(m):
                if u == v and subset[i, j]:
                    r[i, j, v] = flat[i, j, :, v] - torch.stack(here).mean(0)
    scale = torch.stack(list(r.values())).square().mean(0).sqrt()
    unit = {k: x / scale / (x / scale).norm() for k, x in r.items()}

    def target(i, j, v):
        others = [k for k in range(m) if subset[i, k] and not (leave_out and k == j)]
        if not others:
            return None
        mean = torch.stack([r[i, k, v] / scale for k in others]).mean(0)
        return mean / mean.norm()

    total = 0.0
    for i in range(b):
        a = [j for j in range(m) if shown[i, j]]
        for j in a:
            candidates = [target(*pair[:1], j, pair[1]) for pair in cells]
            candidates = torch.stack([x for x in candidates if x is not None])
            losses = []
            for k, v in cells:
                if k != i or target(i, j, v) is None:
                    continue
                logits = candidates @ unit[i, j, v] / temperature
                own = target(i, j, v) @ unit[i, j, v] / temperature
                losses.append((logits.logsumexp(0) - own) / math.log(len(candidates)))
            if losses:
                total += torch.stack(losses).mean() / len(a) / b
    return total


@pytest.mark.parametrize("temperature", [0.3, 1e6])
@pytest.mark.parametrize("leave_out", [True, False])
def test_it_equals_a_loop_with_ragged_masks(leave_out, temperature):
    torch.manual_seed(0)
    features = torch.randn(3, 4, 3, 2, 2, 3, dtype=torch.float64)
    brain = torch.rand(3, 2, 2, 3) < 0.7
    subset = flags([1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 0])
    shown = flags([1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0])
    distance = exact(temperature=temperature, leave_out=leave_out, points=10**6)
    actual = loss_of(distance, features, brain, present=shown, acquired=subset)
    expected = reference(features, brain, shown, subset, temperature, leave_out)
    assert actual.item() == pytest.approx(float(expected), rel=1e-6)


def test_a_target_that_does_not_exist_is_no_candidate_however_cold_it_is():
    # The mean is 0. The targets of flair are -3 of two patients, opposite to it and alike: chance.
    # The third patient has flair alone, so no target; he counts as 0.
    features = samples([3, -3], [3, -3], [0, 0])
    shown, acquired = flags([1, 0], [1, 0], [1, 0]), flags([1, 1], [1, 1], [1, 0])
    for temperature in (1.0, 1e-6):
        value = align(features, exact(temperature=temperature), present=shown, acquired=acquired)
        assert value.item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("leave_out", [True, False])
def test_codes_of_position_and_mask_score_chance_and_the_optimum_under_mse(leave_out):
    torch.manual_seed(0)
    brain = torch.rand(3, 6, 6, 6) < 0.7
    position = torch.randn(1, 1, 5, 6, 6, 6, dtype=torch.float64).expand(3, 4, 5, 6, 6, 6)
    mask = brain[:, None, None].double().expand(3, 4, 1, 6, 6, 6)
    for code in (position, mask, torch.cat([position, mask], 2)):
        value = loss_of(CaseNCE(leave_out=leave_out), code, brain)
        assert value.item() == pytest.approx(1.0, abs=1e-5)
        assert loss_of("nmse", code, brain).item() < 1e-10
        assert loss_of(MSE(), code, brain).item() < 1e-10


def test_what_tells_patients_apart_scores_well_and_noise_does_not():
    torch.manual_seed(0)
    brain = torch.ones(4, 6, 6, 6, dtype=torch.bool)
    anatomy = torch.randn(4, 1, 16, 6, 6, 6)
    shared = loss_of(CaseNCE(), anatomy + 0.1 * torch.randn(4, 4, 16, 6, 6, 6), brain)
    noise = loss_of(CaseNCE(), torch.randn(4, 4, 16, 6, 6, 6), brain)
    assert shared < 0.4 < 1 < noise
    # Random unit vectors: the mean of exp(cos / T) is about exp(1 / 2 C T²). And centring over the
    # 16 latents of a place correlates a latent with the mean of its three others by
    # -1/16 / √(15/16 · (3 · 15/16 - 6/16) / 9) = -0.124.
    spread, opposed = 1 / (2 * 16 * 0.04), 0.124 / 0.2
    assert noise.item() == pytest.approx(1 + (spread + opposed) / math.log(400), abs=0.02)
    # With m in the anchor, noise resembles its own mean.
    assert loss_of(CaseNCE(leave_out=False), torch.randn(4, 4, 16, 6, 6, 6), brain) < 0.8


def test_few_points_are_reproducible_and_representative():
    torch.manual_seed(0)
    features = torch.randn(2, 4, 8, 10, 10, 10) + torch.randn(2, 1, 8, 10, 10, 10)
    brain = torch.rand(2, 10, 10, 10) < 0.6
    few, again = (loss_of(CaseNCE(points=400), features, brain) for _ in range(2))
    assert few == again
    assert few.item() == pytest.approx(
        loss_of(CaseNCE(points=400, seed=1), features, brain).item(), rel=0.05
    )


def test_one_sequence_and_one_patient():
    torch.manual_seed(0)
    features = torch.randn(2, 4, 3, 2, 2, 2, dtype=torch.float64)
    # |A| = 1: the anchor is over the others, which are acquired and not shown.
    one = align(features, CaseNCE(), present=flags([1, 0, 0, 0], [0, 0, 0, 1]))
    assert one > 0
    # S = {m}: there is no other to compare with.
    only = flags([1, 0, 0, 0], [0, 0, 0, 1])
    leaf = features.clone().requires_grad_()
    alone = align(leaf, CaseNCE(), present=only, acquired=only)
    alone.backward()
    assert alone == 0 and not leaf.grad.any()
    # One patient: centring leaves nothing but the differences between sequences.
    assert align(features[:1], CaseNCE()) == 0


def test_meaningless_settings_are_refused():
    with pytest.raises(InputError, match="directions"):
        align(samples([1, 2], [3, 4]), CaseNCE(), NormalAnchor())
    with pytest.raises(InputError, match="above 0"):
        CaseNCE(temperature=0.0)


def test_the_anchor_may_have_weights_of_its_own():
    torch.manual_seed(0)
    features = torch.randn(2, 3, 4, 2, 2, 2, dtype=torch.float64)
    brain = torch.ones(2, 2, 2, 2, dtype=torch.bool)
    heavy = bound(MixtureAnchor([1, 0, 0]), NAMES[:3])
    value = align(features, CaseNCE(), heavy)
    plain = loss_of(CaseNCE(), features, brain)
    assert value != plain  # t1ce and t1 are compared with flair alone
