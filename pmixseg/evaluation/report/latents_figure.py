"""Pictures of latents: two principal channels, coloured by modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure

from pmixseg.evaluation.gap.latents import LatentSample
from pmixseg.evaluation.report.figures import COLOURS

SHOWN_VOXELS = 400
"""Voxels per modality in a scatter plot."""


def projection_figure(
    samples: Mapping[int, LatentSample], names: Sequence[str], title: str
) -> Figure:
    """The first two principal channels of all modalities together, a panel per level.

    Args:
        samples: level -> latents.
        names: of the modalities, as they are to be written.
        title: of the figure.
    """
    figure = Figure(figsize=(3.2 * max(len(samples), 1), 3.4), layout="constrained")
    figure.suptitle(title)
    for axes, (level, sample) in zip(
        figure.subplots(1, max(len(samples), 1), squeeze=False)[0], samples.items(), strict=False
    ):
        pooled = sample.vectors.flatten(0, 1)
        middle = pooled.mean(0)
        # Singular vectors have no sign of their own; the largest entry is made positive.
        _, _, directions = torch.linalg.svd(pooled - middle, full_matrices=False)
        plane = directions[:2].T
        plane = plane * plane.gather(0, plane.abs().argmax(0, keepdim=True)).sign()
        for m, name in enumerate(names):
            dots = ((sample.vectors[:SHOWN_VOXELS, m] - middle) @ plane).numpy()
            second = dots[:, 1] if dots.shape[1] > 1 else dots[:, 0] * 0
            colour = COLOURS[m % len(COLOURS)]
            axes.scatter(dots[:, 0], second, s=4, color=colour, label=name, linewidths=0)
        gap = sample.gap()
        axes.set_title(
            f"level {level}: gap {gap.ratio:.2g}\nvariance {gap.variance:.2g}, "
            f"rank {gap.rank_within:.1f}",
            fontsize=9,
        )
        axes.set_xticks([])
        axes.set_yticks([])
    if samples:
        figure.axes[0].legend(fontsize=8, markerscale=2)
    return figure
