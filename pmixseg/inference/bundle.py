"""A traced model as a MONAI bundle: weights, what they expect, and an inference that runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from monai.data import load_net_with_metadata, save_net_with_metadata

from pmixseg.errors import InputError
from pmixseg.files import hidden_folder_near

MODEL = "models/model.ts"
FORMAT_VERSION = "0.1.0"

README = """# {name}

Segments {regions} from {channels}. {notice}

Written by `pmixseg export` from a model for these scans only. `models/model.ts` maps one window
[1, {count}, {window}] of normalised scans to probabilities of {classes}.

    pip install "monai[fire,ignite]" nibabel
    python -m monai.bundle run --config_file configs/inference.json --bundle_root . \\
        --dataset_dir COHORT --output_dir OUT

COHORT holds skull-stripped, co-registered scans named `*_{first}.nii.gz` and so on. They reach the
network exactly as in `pmixseg segment`, but the windows lie on the box of the brain as MONAI crops
it, up to 7 voxels from where pmixseg puts them. A network is not indifferent to that: labels differ
where it is unsure, as they do between two overlaps, and are no better or worse for it.
Probabilities are at temperature 1; the one fitted for these scans is {temperature:g} (1: none), for
softmax(log p / T).
"""


def write_bundle(
    traced: torch.jit.ScriptModule, folder: Path, facts: Mapping[str, Any]
) -> torch.jit.ScriptModule:
    """Write a bundle folder, complete or not at all; it must not exist, or be empty.

    The model maps ``[1, K, D, H, W]`` to probabilities ``[1, C, D, H, W]``; for the facts see
    :func:`~pmixseg.inference.export.describe_export`.

    Returns:
        The model, read back as MONAI reads it.

    Raises:
        InputError: the folder is in use.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{folder} exists and is not an empty folder; choose another for the bundle."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    packed = BytesIO()  # PyTorch's own writer aborts the process where a disk is full
    save_net_with_metadata(traced, packed, meta_values=dict(facts))
    with hidden_folder_near(folder) as part:
        for name in ("models", "configs", "docs"):
            (part / name).mkdir()
        (part / MODEL).write_bytes(packed.getbuffer())
        for name, content in (("metadata", metadata(facts)), ("inference", inference(facts))):
            text = json.dumps(content, indent=4) + "\n"
            (part / "configs" / f"{name}.json").write_text(text, encoding="utf-8")
        (part / "docs" / "README.md").write_text(_readme(folder.name, facts), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        part.replace(folder)
    network: torch.jit.ScriptModule = load_net_with_metadata(str(folder / MODEL))[0]
    return network


def metadata(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``configs/metadata.json`` in MONAI's schema."""
    channels, window = facts["channels"], facts["window"]
    shape = {"num_channels": len(channels), "spatial_shape": window, "dtype": "float32"}
    return {
        "version": FORMAT_VERSION,
        "changelog": {FORMAT_VERSION: "exported by pmixseg"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").split("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"nibabel": version("nibabel")},
        "task": f"segmentation, task '{facts['task']['name']}'",
        "description": f"Labels from {facts['combination']}. {facts['notice']}",
        "authors": "the pmixseg model's trainer",
        "copyright": "see the model's trainer",
        "intended_use": facts["notice"],
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": "MR",
                    **shape,
                    "value_range": [],
                    "is_patch_data": True,
                    "channel_def": {str(i): name for i, name in enumerate(channels)},
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "segmentation",
                    **shape,
                    "num_channels": len(facts["classes"]),
                    "value_range": [0, 1],
                    "is_patch_data": True,
                    "channel_def": {str(i): name for i, name in enumerate(facts["classes"])},
                }
            },
        },
        "pmixseg": dict(facts),
    }


def inference(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``configs/inference.json``: canonicalise, slide, undo, save; MONAI's parts only."""
    channels = facts["channels"]
    first = f"_{channels[0]}.nii.gz"
    spacing = [
        {"_target_": "Spacingd", "keys": "image", "pixdim": facts["spacing"], "mode": "bilinear"}
    ]
    return {
        "imports": ["$import glob", "$import os"],
        "bundle_root": ".",
        "dataset_dir": ".",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "channels": channels,
        "stems": f"$[p[:-{len(first)}] for p in sorted(glob.glob(os.path.join(@dataset_dir, "
        f"'**', '*{first}'), recursive=True))]",
        "datalist": "$[{'image': [f'{s}_{c}.nii.gz' for c in @channels]} for s in @stems]",
        "network_def": f"$torch.jit.load(@bundle_root + '/{MODEL}', map_location=@device).eval()",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True},
                {"_target_": "Orientationd", "keys": "image", "axcodes": facts["orientation"]},
                *(spacing if facts["spacing"] else []),
                {
                    "_target_": "CropForegroundd",
                    "keys": "image",
                    "source_key": "image",
                    "select_fn": "$lambda x: x != 0",
                    "allow_smaller": True,
                },
                {
                    "_target_": "NormalizeIntensityd",
                    "keys": "image",
                    "nonzero": True,
                    "channel_wise": True,
                },
                {"_target_": "EnsureTyped", "keys": "image"},
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": facts["window"],
            "sw_batch_size": 1,
            "overlap": facts["overlap"],
            "mode": "gaussian" if facts["blend"] == "gaussian" else "constant",
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {
                    "_target_": "Invertd",
                    "keys": "pred",
                    "transform": "@preprocessing",
                    "orig_keys": "image",
                    "nearest_interp": False,
                    "to_tensor": True,
                },
                {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_postfix": "seg",
                    "output_dtype": "uint8",
                    "separate_folder": False,
                },
            ],
        },
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network_def",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
        },
        "initialize": ["$torch.set_grad_enabled(False)"],
        "run": ["$@evaluator.run()"],
    }


def _readme(name: str, facts: Mapping[str, Any]) -> str:
    return README.format(
        name=name,
        regions=", ".join(facts["task"]["regions"]),
        channels=", ".join(facts["channels"]),
        notice=facts["notice"],
        count=len(facts["channels"]),
        window=", ".join(str(n) for n in facts["window"]),
        classes=", ".join(facts["classes"]),
        first=facts["channels"][0],
        temperature=facts["temperature"],
    )
