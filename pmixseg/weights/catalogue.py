"""The models that have a name, and the facts about each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """Describe one model that can be named: where it lies, and what is known of it.

    Args:
        title: what it is, in a line.
        address: where its published folder lies (``hf://…`` or ``https://…``); ``None`` where the
            authors' own page is the only source and the file must be fetched by hand.
        page: the authors' page, which says where their weights are kept.
        licence: of the weights, as far as the authors state one.
        reading: the command that turns the authors' file into a checkpoint of this package.
        citation: what to cite.
    """

    title: str
    address: str | None
    page: str
    licence: str
    reading: str
    citation: str


CATALOGUE: Mapping[str, Entry] = {
    "rfnet-brats2020": Entry(
        title="RFNet, any subset of FLAIR, T1ce, T1, T2; BraTS labels",
        address=None,
        page="https://github.com/dyh127/RFNet",
        licence="not stated by the authors",
        reading="pmixseg import rfnet FILE.pth -o rfnet.ckpt",
        citation="Ding, Yu, Yang: RFNet. ICCV 2021",
    ),
    "mmformer-brats2018": Entry(
        title="mmFormer, any subset of FLAIR, T1ce, T1, T2; BraTS labels",
        address=None,
        page="https://github.com/YaoZhang93/mmFormer",
        licence="not stated by the authors",
        reading="pmixseg import mmformer FILE.pth -o mmformer.ckpt",
        citation="Zhang et al.: mmFormer. MICCAI 2022 (arXiv 2206.02425)",
    ),
}
"""Name -> model. Their authors keep these weights; none of them is a file of this package."""
