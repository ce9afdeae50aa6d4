"""Sliding-window prediction of many combinations from one encoding of each window."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol, get_args

import torch
from jaxtyping import Bool, Float
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch import Tensor
from torch.nn.functional import pad

from pmixseg.describe import SHARE
from pmixseg.errors import InputError
from pmixseg.execution import static_on
from pmixseg.types import Image, Latents, Presence, SegOutput

BatchSize = int | Literal["auto"]
Blend = Literal["gaussian", "uniform"]
Window = tuple[slice, ...]

FULL_CARD = 16
"""Windows that a GPU predicts at once by default, if its memory holds them."""

GAUSSIAN_SIGMA = 0.125
"""Standard deviation of the blending weights, in patch lengths (MONAI's and nnU-Net's value)."""


class Predictor(Protocol):
    """What prediction needs of a network: a backbone, or a module that fills before it decodes."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the M input channels."""

    @property
    def num_classes(self) -> int:
        """Softmax classes C, background included."""

    @property
    def strides(self) -> tuple[int, ...]:
        """Voxels of the input per voxel of each level; a patch is divisible by the last."""

    @property
    def shares_encoding(self) -> bool:
        """Whether latents of one encoding may be restricted to smaller combinations."""

    def encode(self, image: Image, present: Presence) -> Latents:
        """Encode the present modalities."""

    def decode(self, latents: Latents) -> SegOutput:
        """Segment from the slots that ``latents.usable`` shows."""


def iterate_combinations(
    predictor: Predictor,
    image: Float[Tensor, "m d h w"],
    present: Bool[Tensor, "k m"],
    *,
    patch: Sequence[int],
    overlap: float = 0.5,
    batch_size: BatchSize = 1,
    blend: Blend = "gaussian",
    chunk: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[range, Float[Tensor, "k c d h w"]]]:
    r"""Predict class probabilities of one volume for every combination, a few at a time.

    .. math:: p_k(v) = \frac{\sum_{u \ni v} w(v - u)\, \mathrm{softmax}(f_k(x_u))(v - u)}
                            {\sum_{u \ni v} w(v - u)}

    over windows :math:`u`. A window is encoded once, with every modality that some combination
    shows, and decoded K times, if ``predictor.shares_encoding``; otherwise it is encoded for each
    combination. Encoders of modalities that no combination shows are not run. A volume smaller
    than the patch is zero-padded on both sides, as in training. No window is skipped: a network
    with normalisation layers may answer anything but background to an empty one.

    Args:
        predictor: the network, in eval mode.
        image: one case, z-scored, background 0.
        present: one row of flags per combination; no row is empty.
        patch: window shape in voxels, divisible by the predictor's largest stride.
        overlap: share of a window that the next one covers, in [0, 1).
        batch_size: windows in one forward pass; fewer where the memory of a GPU does not hold
            them. Where a volume has fewer windows, several combinations are decoded together.
            ``auto``: 1 on a CPU, on a GPU as many as fill it.
        blend: weights ``w``: a Gaussian around the window's centre, or 1.
        chunk: combinations held in memory at once (default: all), in 4·C·d·h·w bytes each. Every
            chunk encodes anew.
        progress: called with (windows done, windows in all) after each forward pass, of all chunks.

    Yields:
        Rows of ``present`` that were done, and their float32 probabilities on the image's device;
        they sum to 1 over classes.

    Raises:
        InputError: the patch, the overlap or the blending is impossible, a combination is empty,
            the image has another number of channels than the predictor, or the memory of a GPU
            does not hold a single window.
        ValueError: the predictor is in training mode.
    """
    _check(predictor, image, present, patch)
    _check_settings(overlap, batch_size, blend, chunk)
    # Windows over the padded volume, and how much each voxel is covered in all.
    padded, inner = _pad_to(image, patch)
    visible: Window = (slice(None), slice(None), *inner)
    step = [max(int(p * (1 - overlap)), 1) for p in patch]
    windows: list[Window] = dense_patch_slices(padded.shape[1:], patch, step)
    mode = "gaussian" if blend == "gaussian" else "constant"
    weight = compute_importance_map(
        tuple(patch), mode=mode, sigma_scale=GAUSSIAN_SIGMA, device=image.device
    )
    total = padded.new_zeros(padded.shape[1:], dtype=torch.float32)
    for window in windows:
        total[window] += weight

    # A chunk of combinations at a time: sums of weighted windows, divided at the end.
    size = chunk or len(present)
    starts = range(0, len(present), size)
    at_once = _at_once(batch_size, image.device)
    for number, first in enumerate(starts):
        rows = range(first, min(first + size, len(present)))
        flags = present[rows.start : rows.stop].to(image.device)
        sums = padded.new_zeros(
            (len(rows), predictor.num_classes, *padded.shape[1:]), dtype=torch.float32
        )
        done = 0
        while done < len(windows):
            batch = windows[done : done + at_once]
            at_once = _add(predictor, padded, batch, flags, weight, sums, at_once)
            done += len(batch)
            if progress is not None:
                progress(number * len(windows) + done, len(starts) * len(windows))
        means = sums.div_(total)[visible]
        _check_finite(means)
        yield rows, means


def _at_once(batch_size: BatchSize, device: torch.device) -> int:
    """Return how many windows go into one forward pass."""
    if batch_size != "auto":
        return batch_size
    return FULL_CARD if static_on(device) else 1


def _add(
    predictor: Predictor,
    padded: Tensor,
    windows: Sequence[Window],
    flags: Bool[Tensor, "k m"],
    weight: Tensor,
    sums: Float[Tensor, "k c d h w"],
    at_once: int,
) -> int:
    """Add the network's output in some windows, and return for how many of them memory sufficed."""
    done = 0
    stack = torch.stack([padded[(slice(None), *w)] for w in windows])
    try:
        for group in _probabilities(predictor, stack, flags, max(at_once // len(windows), 1)):
            into = sums[done : done + len(group)]
            for window, one in zip(windows, group.unbind(1), strict=True):
                into[(slice(None), slice(None), *window)].addcmul_(one, weight)
            done += len(group)
        return at_once
    except torch.OutOfMemoryError as error:
        if at_once == 1:
            raise InputError(
                f"the memory of {flags.device} does not hold one window of "
                f"{list(weight.shape)} voxels; use a smaller evaluation.window, or a CPU."
            ) from error
    # Outside the except clause, which would hold on to the tensors of the failed attempt.
    torch.cuda.empty_cache()
    fewer, start = max(at_once // 2, 1), 0
    while start < len(windows):
        part = windows[start : start + fewer]
        fewer = _add(predictor, padded, part, flags[done:], weight, sums[done:], fewer)
        start += len(part)
    return fewer


@torch.no_grad()
def _probabilities(
    predictor: Predictor, stack: Image, flags: Bool[Tensor, "k m"], together: int
) -> Iterator[Float[Tensor, "k b c d h w"]]:
    """Yield the softmax of one batch of windows, a few combinations at a time."""
    size = len(stack)
    shared = None
    if predictor.shares_encoding:
        shared = predictor.encode(stack, flags.any(0).expand(size, -1))
    for rows in torch.split(flags, together):
        shown = rows.repeat_interleave(size, 0)
        if shared is None:
            image = stack if len(rows) == 1 else stack.repeat(len(rows), 1, 1, 1, 1)
            latents = predictor.encode(image, shown)
        else:
            latents = shared.repeated(len(rows)).restrict(shown)
        probabilities = predictor.decode(latents).logits.float().softmax(1)
        yield probabilities.view(len(rows), size, *probabilities.shape[1:])


def _pad_to(image: Tensor, patch: Sequence[int]) -> tuple[Tensor, Window]:
    """Pad each axis by zeros to at least the patch; return where the image then lies."""
    missing = [max(p - n, 0) for p, n in zip(patch, image.shape[1:], strict=True)]
    sides = [(m // 2, m - m // 2) for m in missing]
    inner = tuple(
        slice(before, before + n) for (before, _), n in zip(sides, image.shape[1:], strict=True)
    )
    if any(missing):
        image = pad(image, [n for side in reversed(sides) for n in side])
    return image, inner


def _check(predictor: Predictor, image: Tensor, present: Tensor, patch: Sequence[int]) -> None:
    names, stride = list(predictor.modalities), predictor.strides[-1]
    if image.ndim != 4 or image.shape[0] != len(names):
        raise InputError(
            f"the image has shape {tuple(image.shape)}, but the network reads [M, D, H, W] with "
            f"M = {len(names)} {names}; prepare the case for the same task."
        )
    if present.ndim != 2 or present.shape[1] != len(names) or not len(present):
        raise InputError(
            f"present has shape {tuple(present.shape)}; give one row of {len(names)} flags {names} "
            "per combination."
        )
    if not present.any(1).all():
        raise InputError("a combination is empty; show the network at least one modality.")
    if len(patch) != 3 or any(p < 1 or p % stride for p in patch):
        raise InputError(
            f"patch {list(patch)} must be three lengths divisible by {stride}, the largest stride "
            "of the network; choose such a patch."
        )
    if getattr(predictor, "training", False):
        raise ValueError("the predictor is in training mode; call .eval() before predicting.")


def _check_settings(overlap: float, batch_size: BatchSize, blend: Blend, chunk: int | None) -> None:
    if overlap not in SHARE:
        raise InputError(f"overlap is {overlap}; give {SHARE}.")
    if batch_size != "auto" and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; give at least 1 window, or auto.")
    if blend not in get_args(Blend):
        raise InputError(f"blend '{blend}' is unknown; use {' or '.join(get_args(Blend))}.")
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk is {chunk}; give at least 1 combination.")


def _check_finite(probabilities: Tensor) -> None:
    if not math.isfinite(float(probabilities.sum())):
        raise InputError(
            "the network answers with numbers that are not finite: its weights or the scans hold "
            "extreme values, or half precision is too coarse for it; use another checkpoint, or "
            "compute in fp32."
        )
