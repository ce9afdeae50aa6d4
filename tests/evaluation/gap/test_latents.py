"""Latents at corresponding voxels of whole cases."""

import pytest
import torch

from pmixseg.backbones import MultiEncoderUNet
from pmixseg.evaluation.gap.latents import (
    LatentSample,
    centre_window,
    named_subsets,
    sample_latents,
)
from pmixseg.evaluation.report.figures import projection_figure
from pmixseg.losses.anchors import MixtureAnchor, ModalityAnchor, NormalAnchor
from pmixseg.task import BRATS


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
    ("anchor", "want"),
    [
        (None, [0.25] * 4),
        (NormalAnchor(), [0.25] * 4),
        (MixtureAnchor([1, 2, 3, 4]), [0.1, 0.2, 0.3, 0.4]),
        (ModalityAnchor("t1"), [0, 0, 1, 0]),
    ],
)
def test_vectors_are_those_of_the_encoder_and_the_anchor_s_weights_are_found(anchor, want):
    torch.manual_seed(0)
    net = MultiEncoderUNet(BRATS.modalities, 4, width=4, levels=2).eval()
    if anchor is not None:
        anchor.bind(BRATS.modalities, 2)
    image = torch.randn(4, 8, 8, 8)
    sample = sample_latents(net, [image], (8, 8, 8), anchor, [1], points=10**6)[1]
    assert sample.weights.tolist() == pytest.approx(want)
    encoded = net.encode(image[None], torch.ones(1, 4, dtype=torch.bool)).features[1]
    assert sample.vectors.shape == (64, 4, 8)
    assert sample.vectors.sum().item() == pytest.approx(encoded.double().sum().item(), rel=1e-4)
    assert sample.targets.mean().item() == pytest.approx(
        torch.einsum("m,bmcdhw->bcdhw", torch.tensor(want).float(), encoded).mean().item(), rel=1e-4
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
