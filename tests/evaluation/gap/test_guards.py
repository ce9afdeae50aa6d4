"""What a closed gap cannot buy: rank within a modality, the whitened gap, decodability."""

import math

import pytest
import torch

from pmixseg.callbacks.gap import region_maps
from pmixseg.evaluation.gap.guards import (
    decodability,
    effective_rank,
    low_guards,
    rank_within,
    whitened_gap,
)
from pmixseg.evaluation.gap.latents import sample_latents
from pmixseg.task import BRATS
from pmixseg.types import Latents


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))) == pytest.approx(2.0)
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert effective_rank(torch.diag(torch.tensor([9.0, 1.0]))) == pytest.approx(math.exp(entropy))
    assert effective_rank(torch.zeros(3, 3)) == 0.0


def test_the_gap_does_not_count_as_rank():
    flat = gaussian(500, 1, 1).expand(500, 4, 6)  # one direction for all
    apart = flat + 10 * torch.eye(6, dtype=torch.float64)[:4]  # four modalities far from each other
    assert rank_within(apart) == pytest.approx(1.0)
    assert rank_within(gaussian(4000, 4, 6)) == pytest.approx(6.0, abs=0.05)


def test_whitened_gap_by_hand_and_under_linear_maps():
    # Two voxels, two modalities, one channel: S_W = 4, S_T = 5 (and the ridge).
    vectors = torch.tensor([[[0.0], [4.0]], [[2.0], [6.0]]])
    assert whitened_gap(vectors, vectors.mean(1)) == pytest.approx(4 / (5 * 1.001))
    x = gaussian(400, 3, 4)
    value = whitened_gap(x, x.mean(1))
    assert value == pytest.approx(2 / 3, abs=0.02)  # 1 - 1/M: nothing agrees
    turned = 7 * x @ torch.linalg.qr(gaussian(4, 4, seed=1)).Q
    assert whitened_gap(turned, turned.mean(1)) == pytest.approx(value)
    assert whitened_gap(torch.ones(5, 2, 3), torch.ones(5, 3)) == 0.0


def test_a_blown_up_direction_closes_the_plain_gap_but_not_the_whitened_one():
    x = gaussian(400, 3, 4)
    x[:, :, 0] = 10 * gaussian(400, 1, seed=3)  # all modalities agree there
    apart = (x - x.mean(1, keepdim=True)).square().mean() / x.flatten(0, 1).var(0).mean()
    assert apart < 0.03
    assert whitened_gap(x, x.mean(1)) == pytest.approx(0.75 * 2 / 3, abs=0.05)


def test_decodability_of_what_is_there_and_what_is_not():
    cases = torch.arange(4).repeat_interleave(100)
    x = gaussian(400, 2, 5)
    linear = x[:, 0] @ gaussian(5, 1, seed=1) + 3
    noise = gaussian(400, 1, seed=2)
    constant = torch.ones(400, 1, dtype=torch.float64)
    regions = torch.cat([linear, noise, constant], 1)
    values = decodability(x[:, :1], regions, cases)
    assert values[0] > 0.99 and values[1] < 0.05 and math.isnan(values[2])
    both = decodability(x, regions, cases)  # the second modality knows nothing
    assert both[0] == pytest.approx(0.5, abs=0.05)
    one = decodability(x[:, :1], regions, torch.zeros(400, dtype=torch.long))
    assert one[0] > 0.99


def test_decodability_is_tested_on_other_cases():
    # A code of the case tells the share of the region, but not that of a case never seen.
    cases = torch.arange(5).repeat_interleave(40)
    code = torch.nn.functional.one_hot(cases).double()[:, None] + 1e-3 * gaussian(200, 1, 5)
    regions = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5], dtype=torch.float64)[cases][:, None]
    assert decodability(code, regions, cases)[0] < 0.1


def test_decodability_equals_a_loop():
    x, y = gaussian(60, 1, 3), gaussian(60, 2, seed=1)
    cases = torch.arange(3).repeat_interleave(20)
    missed = torch.zeros(2, dtype=torch.float64)
    for k in range(3):
        train, held = cases != k, cases == k
        a, b = x[train, 0], y[train]
        mean, scale = a.mean(0), a.std(0, correction=0)
        design = (a - mean) / scale
        gram = design.T @ design + 0.01 * 40 * torch.eye(3, dtype=torch.float64)
        for r in range(2):
            slope = torch.inverse(gram) @ design.T @ (b[:, r] - b[:, r].mean())
            predicted = ((x[held, 0] - mean) / scale) @ slope + b[:, r].mean()
            missed[r] += (y[held, r] - predicted).square().sum()
    expected = 1 - missed / (y - y.mean(0)).square().sum(0)
    torch.testing.assert_close(decodability(x, y, cases), expected)


@pytest.mark.parametrize(
    ("values", "reference", "low"),
    [
        ((4.0, 0.5), (8.0, 0.6), []),
        ((3.9, 0.5), (8.0, 0.6), ["rank_within"]),
        ((1.0, 0.5), (1.9, 0.6), []),  # half of a small rank is under 1, which no rank is
        ((8.0, 0.47), (8.0, 0.6), ["decodability"]),
        ((1.0, -0.2), (8.0, 0.6), ["rank_within", "decodability"]),
        ((8.0, -0.2), (8.0, 0.04), []),  # there was nothing to lose
        ((8.0, -0.2), (8.0, -0.9), []),
    ],
)
def test_collapse_by_the_shares(values, reference, low):
    names = ("rank_within", "decodability")
    now, before = (dict(zip(names, v, strict=True)) for v in (values, reference))
    assert low_guards(now, before) == low
    assert low_guards({"rank_within": 1.0}, {}) == []
    assert low_guards(now, before, cases=4) == [name for name in low if name != "decodability"]


class Identity(torch.nn.Module):
    """Latents of one channel that are the image itself, at one level."""

    modalities = BRATS.modalities

    def encode(self, image, present):
        return Latents([image[:, :, None]], self.modalities, [present])


def test_regions_travel_with_the_voxels():
    label = torch.zeros(8, 8, 8, dtype=torch.long)
    label[2:4, 2:6, 2:6] = 1
    label[4:6, 2:6, 2:6] = 3
    maps = region_maps(label, BRATS)
    regions = list(BRATS.regions)
    sizes = {name: int(m.sum()) for name, m in zip(regions, maps, strict=True)}
    assert sizes["WT"] == 64 and sizes["ET"] == 32
    image = torch.stack([1 + maps[regions.index("WT")]] * 4)
    sample = sample_latents(
        Identity(), [image, image], (6, 6, 6), None, [0], points=400, regions=[maps, maps]
    )[0]
    torch.testing.assert_close(sample.vectors[:, 0, 0] - 1, sample.regions[:, regions.index("WT")])
    by_region = dict(zip(regions, sample.decodability(), strict=True))
    assert by_region["WT"] == pytest.approx(1.0, abs=1e-3) and by_region["ET"] < 0.8
