"""Use TorchIO transforms as augmentation, named in YAML."""

from __future__ import annotations

from typing import Any

import torch
import torchio
from jaxtyping import Float, Int64
from torch import Tensor

from pmixseg.data.patches import PatchTransform
from pmixseg.describe import build
from pmixseg.errors import InputError


class TorchIOTransform(PatchTransform):
    """Apply TorchIO transforms, one after the other, to each patch where it is read.

    They run on the CPU, in the data loader's workers; :class:`~pmixseg.data.augment.Augmentation`
    is many times faster. A patch is a subject with the images ``image`` (M channels) and ``label``;
    labels are resampled by nearest neighbour. TorchIO draws from torch's global generator, which
    is seeded with the patch's key and put back afterwards.

    Args:
        transforms: TorchIO transforms, or their ``{class_path, init_args}``.

    Raises:
        InputError: a class that cannot be made, or is no TorchIO transform.

    Example:
        >>> flip = {"class_path": "torchio.RandomFlip", "init_args": {"axes": [0, 1, 2]}}
        >>> augmentation = TorchIOTransform([flip])
    """

    def __init__(self, transforms: list[Any]) -> None:
        made = [build(transform) for transform in transforms]
        wrong = [type(t).__name__ for t in made if not isinstance(t, torchio.Transform)]
        if wrong:
            raise InputError(
                f"TorchIOTransform: {wrong} are no TorchIO transforms; name classes of torchio."
            )
        self.compose = torchio.Compose(made)

    def __call__(
        self, image: Float[Tensor, "m d h w"], label: Int64[Tensor, "d h w"], key: int
    ) -> tuple[Float[Tensor, "m d h w"], Int64[Tensor, "d h w"]]:
        """Augment one patch.

        Raises:
            InputError: a transform changes the patch's shape.
        """
        subject = torchio.Subject(
            image=torchio.ScalarImage(tensor=image), label=torchio.LabelMap(tensor=label[None])
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key)
            made = self.compose(subject)
        out, out_label = made["image"].data, made["label"].data[0]
        if out.shape != image.shape or out_label.shape != label.shape:
            raise InputError(
                f"a TorchIO transform made a patch of {tuple(image.shape)} into "
                f"{tuple(out.shape)}; use transforms that keep the shape."
            )
        return out.float(), out_label.long()
