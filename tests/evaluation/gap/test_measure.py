"""Latents at corresponding voxels of whole cases, and the numbers of their gap."""

import math

import pytest
import torch

from pmixseg.backbones import MultiEncoderUNet
from pmixseg.evaluation.gap.latents import (
    LatentSample,
    centre_window,
    named_subsets,
    sample_latents,
)
from pmixseg.evaluation.gap.measure import (
    corrected_total_correlation,
    linear_cka,
    measure_gap,
    voxel_vectors,
)
from pmixseg.evaluation.report.figures import projection_figure
from pmixseg.losses.anchors import MixtureAnchor, ModalityAnchor, NormalAnchor
from pmixseg.task import BRATS


def gaussian(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gap_of(vectors):
    return measure_gap(vectors, vectors.mean(1))


def test_numbers_by_hand():
    # Two voxels, two modalities, one channel: a = 0, 2; b = 4, 6; P = 2, 4; mean 3, variance 5.
    vectors = torch.tensor([[[0.0], [4.0]], [[2.0], [6.0]]])
    gap = gap_of(vectors)
    assert gap.numerator == 4.0 and gap.variance == 5.0 and gap.ratio == 0.8
    assert gap.centroid_distance == pytest.approx(4 / math.sqrt(5))
    assert gap.cka == pytest.approx(1.0) and gap.rank_within == pytest.approx(1.0)
    # Moments: N(1, 1) and N(5, 1); mixture N(3, 5): ½ (ln 5 + (1 + 4)/5 - 1).
    assert gap.moment_kl == pytest.approx(0.5 * math.log(5))


def test_equal_modalities_have_no_gap():
    shared = gaussian(2000, 1, 6).expand(-1, 3, -1)
    gap = gap_of(shared)
    assert gap.ratio < 1e-30 and gap.centroid_distance == 0.0
    assert gap.cka == pytest.approx(1.0) and gap.jensen_shannon == pytest.approx(0.0, abs=1e-9)
    assert gap.rank_within == pytest.approx(6.0, abs=0.05)
    assert gap.total_correlation > 5  # one determines the others


def test_independent_modalities_share_nothing():
    gap = gap_of(gaussian(4000, 4, 8))
    assert gap.ratio == pytest.approx(0.75, abs=0.02)  # 1 - 1/M of the variance is between them
    assert gap.cka < 0.02 and gap.total_correlation == pytest.approx(0.0, abs=0.05)
    assert gap.jensen_shannon < 0.02 and gap.moment_kl < 1e-3


def test_shifted_modalities_diverge_up_to_log_m():
    vectors = gaussian(2000, 3, 5)
    vectors[:, 1] += 100
    vectors[:, 2] -= 100
    gap = gap_of(vectors)
    assert gap.jensen_shannon == pytest.approx(math.log(3), abs=1e-6)
    distances = (100 + 100 + 200) / 3 * math.sqrt(5)
    assert gap.centroid_distance == pytest.approx(distances / math.sqrt(5 * gap.variance), rel=1e-2)


def test_moment_kl_is_blind_where_the_ratio_is_not():
    """docs/method/alignment.md: instance normalisation sets every moment, whatever the gap."""
    vectors = gaussian(1000, 2, 16)
    vectors = (vectors - vectors.mean(0)) / vectors.std(0, correction=0)
    gap = gap_of(vectors)
    assert gap.moment_kl < 1e-12 and gap.ratio > 0.4


def test_total_correlation_needs_its_baseline():
    """docs/method/theory.md: 13.6 nats for independent features at 64 channels, 1024 voxels."""
    vectors = gaussian(1024, 4, 64)
    covariance = torch.cov(vectors.flatten(1).T)
    blocks = [covariance[64 * m : 64 * m + 64, 64 * m : 64 * m + 64].logdet() for m in range(4)]
    plain = 0.5 * (sum(blocks) - covariance.logdet()).item()
    assert plain == pytest.approx(13.6, abs=0.7)
    assert corrected_total_correlation(vectors) == pytest.approx(0.0, abs=0.3)


def test_total_correlation_of_known_dependence():
    shared = gaussian(20_000, 1, 1)
    vectors = torch.cat([shared, 0.6 * shared + 0.8 * gaussian(20_000, 1, 1, seed=1)], 1)
    assert corrected_total_correlation(vectors) == pytest.approx(-0.5 * math.log(0.64), abs=0.02)


def test_cka_ignores_rotation_and_scale_but_not_other_content():
    x = gaussian(500, 6)
    rotation = torch.linalg.qr(gaussian(6, 6, seed=1)).Q
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1.0)
    assert linear_cka(x, gaussian(500, 6, seed=2)) < 0.05
    assert linear_cka(x, torch.ones(500, 2).double()) == 0.0


@pytest.mark.parametrize("vectors", [torch.zeros(5, 3, 4), torch.full((5, 1, 4), 7.0)])
def test_constant_latents_give_numbers(vectors):
    values = gap_of(vectors).to_dict()
    assert len(values) == 10 and all(math.isfinite(v) for v in values.values())
    assert values["variance"] == 0.0 and values["rank_within"] == 0.0 and values["whitened"] == 0.0


@pytest.mark.parametrize("m", [1, 2])
def test_few_voxels_and_one_modality_give_numbers(m):
    for vectors in (gaussian(2, m, 10), gaussian(300, m, 10), gaussian(300, m, 10).float()):
        assert all(math.isfinite(v) for v in gap_of(vectors).to_dict().values())
    one = gap_of(gaussian(300, 1, 10))
    assert (one.ratio, one.cka, one.jensen_shannon, one.total_correlation) == (0, 1, 0, 0)
    with pytest.raises(ValueError, match="two voxels"):
        gap_of(gaussian(1, 2, 3))


def test_a_modality_that_is_constant_is_measured():
    vectors = gaussian(300, 2, 4)
    vectors[:, 1] = 0.5
    assert all(math.isfinite(v) for v in gap_of(vectors).to_dict().values())


def test_voxels_are_drawn_inside_the_mask_without_replacement():
    features = torch.arange(2 * 27.0).view(2, 1, 1, 3, 3, 3).expand(2, 3, 1, 3, 3, 3)
    anchor = features[:, 0] + 0.5
    mask = torch.zeros(2, 3, 3, 3, dtype=torch.bool)
    mask[0, 0], mask[1, 2] = True, True
    vectors, targets = voxel_vectors(features, anchor, mask)
    assert vectors.shape == (18, 3, 1) and targets.shape == (18, 1)
    assert sorted(vectors[:, 0, 0].tolist()) == [*range(9), *range(45, 54)]
    assert torch.equal(targets, vectors[:, 1] + 0.5)
    few, _ = voxel_vectors(features, anchor, mask, points=4)
    assert len(few) == 4 and torch.equal(few, voxel_vectors(features, anchor, mask, points=4)[0])
    assert not torch.equal(few, voxel_vectors(features, anchor, mask, points=4, seed=1)[0])
    assert len(voxel_vectors(features, anchor)[0]) == 54


def sample(weights=(0.5, 0.5, 0.0)):
    # Two voxels, three modalities, one channel.
    vectors = torch.tensor([[[0.0], [4.0], [1.0]], [[2.0], [6.0], [1.0]]], dtype=torch.float64)
    w = torch.tensor(weights, dtype=torch.float64)
    return LatentSample(vectors, torch.einsum("m,nmc->nc", w, vectors), w)


def test_gap_among_some_modalities_by_hand():
    # a = 0, 2 and b = 4, 6: P = 2, 4, squared distance 4, mean 3, variance 5.
    assert sample().ratio([0, 1]) == pytest.approx(0.8)
    # All of the weight on b: squared distances 16 and 0.
    assert sample((0.0, 1.0, 0.0)).ratio([0, 1]) == pytest.approx(8 / 5)
    # A pair that the anchor gives no weight counts equally: a = 0, 2 and c = 1, 1 around ½, 1½.
    assert sample((0.0, 1.0, 0.0)).ratio([0, 2]) == pytest.approx(0.25 / 0.5)
    everything = sample((0.2, 0.3, 0.5))
    assert everything.ratio([0, 1, 2]) == pytest.approx(everything.gap().ratio)


def test_window_is_around_the_brain_and_padded():
    image = torch.zeros(2, 10, 10, 4)
    image[1, 6:9, 1:4, 1:3] = 1.0
    cut = centre_window(image, (5, 3, 6))
    assert cut.shape == (2, 5, 3, 6)
    assert cut.sum() == image.sum()
    assert centre_window(torch.zeros(1, 4, 4, 4), (2, 2, 2)).shape == (1, 2, 2, 2)
    assert torch.equal(centre_window(cut, (5, 3, 6)), cut)


@pytest.mark.parametrize(
    ("anchor", "expected"),
    [
        (None, [0.25] * 4),
        (NormalAnchor(), [0.25] * 4),
        (MixtureAnchor([1, 2, 3, 4]), [0.1, 0.2, 0.3, 0.4]),
        (ModalityAnchor("t1"), [0, 0, 1, 0]),
    ],
)
def test_vectors_are_those_of_the_encoder_and_the_anchor_s_weights_are_found(anchor, expected):
    torch.manual_seed(0)
    net = MultiEncoderUNet(BRATS.modalities, 4, width=4, levels=2).eval()
    if anchor is not None:
        anchor.bind(BRATS.modalities, 2)
    image = torch.randn(4, 8, 8, 8)
    sample = sample_latents(net, [image], (8, 8, 8), anchor, [1], points=10**6)[1]
    assert sample.weights.tolist() == pytest.approx(expected)
    encoded = net.encode(image[None], torch.ones(1, 4, dtype=torch.bool)).features[1]
    assert sample.vectors.shape == (64, 4, 8)
    assert sample.vectors.sum().item() == pytest.approx(encoded.double().sum().item(), rel=1e-4)
    assert sample.targets.mean().item() == pytest.approx(
        torch.einsum("m,bmcdhw->bcdhw", torch.tensor(expected).float(), encoded).mean().item(),
        rel=1e-4,
    )
    few = sample_latents(net, [image, image], (8, 8, 8), anchor, [0, 1], points=20)
    assert len(few[0].vectors) == len(few[1].vectors) == 20


def test_only_brain_voxels_count():
    net = MultiEncoderUNet(BRATS.modalities, 4, width=4, levels=2).eval()
    image = torch.zeros(4, 8, 8, 8)
    image[:, :, :, 2:6] = torch.randn(4, 8, 8, 4)
    sample = sample_latents(net, [image], (8, 8, 8), None, [0, 1], points=10**6)
    assert len(sample[0].vectors) == 256
    assert len(sample[1].vectors) == 32
    assert sample_latents(net, [], (8, 8, 8), None, [0]) == {}


def test_many_modalities_are_compared_in_pairs():
    assert len(named_subsets("abcd")) == 10
    assert len(named_subsets("abcdef")) == 15
    assert named_subsets("ab") == []


def test_figure_has_a_panel_per_level_and_a_colour_per_modality():
    figure = projection_figure({0: sample(), 2: sample()}, ["A", "B", "C"], "Latents")
    assert [a.get_title().split(":")[0] for a in figure.axes] == ["level 0", "level 2"]
    assert len({tuple(c.get_facecolor()[0]) for c in figure.axes[0].collections}) == 3
