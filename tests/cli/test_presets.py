"""Presets of experiments/distillation and of the authors' snippets, by the command line."""

import json
import math

import pytest
import torch
import yaml

from pmixseg.backbones import April2025Network
from pmixseg.losses import April2025Alignment
from pmixseg.modules import July2025Student, StudentModule, load
from tests.cli.presets import EXPERIMENTS, SMALL_UNET, fit, metrics

SMALL = ["--model.backbone.width=4", "--model.backbone.levels=4"]
SMALLER = {"passion": ["--model.backbone.width=4"]}
TERMS = {
    "kdnet": {"logit", "latent"},
    "pmkl": {"soft", "contrast"},
    "protokd": {"logit", "prototype"},
    "smunet": {"content", "style", "output"},
    "acn": {"variational", "output"},
    "passion": {"self"},
    "m3ae": {"subsets"},
}
SELF_TAUGHT = {"passion", "m3ae"}


@pytest.fixture(scope="module")
def teachers(phantom_store, tmp_path_factory):
    """An unaligned teacher and, with mind-the-gap.yaml, an aligned one."""
    runs = tmp_path_factory.mktemp("teachers")
    plain = ["distillation/teacher.yaml"]
    assert fit(phantom_store, runs / "plain", *plain, *SMALL) == 0
    aligned = [*plain, "distillation/mind-the-gap.yaml"]
    assert fit(phantom_store, runs / "aligned", *aligned, *SMALL) == 0
    return runs


def taught_by(teachers, which):
    return f"--distill.teacher={teachers}/{which}/checkpoints/last.ckpt"


def test_mind_the_gap_is_the_teacher_with_alignment(teachers):
    assert math.isfinite(metrics(teachers / "aligned")["train/align"])
    assert "train/align" not in metrics(teachers / "plain")
    teacher = load(teachers / "aligned" / "checkpoints" / "last.ckpt")
    assert teacher.anchor.learned


@pytest.mark.parametrize("name", TERMS)
def test_every_preset_adds_its_terms_to_the_loss(name, teachers, phantom_store, tmp_path):
    """Each student from the aligned teacher, which is mind-the-gap with that student."""
    taught = [] if name in SELF_TAUGHT else [taught_by(teachers, "aligned")]
    small = SMALLER.get(name, SMALL)
    assert fit(phantom_store, tmp_path, f"distillation/{name}.yaml", *small, *taught) == 0
    logged = metrics(tmp_path)
    for term in TERMS[name]:
        assert math.isfinite(logged[f"train/distill/{term}"]), term
        assert logged[f"train/distill/{term}"] > 0, term
    parts = logged["train/seg"] + logged["train/distill"]
    assert logged["train/loss"] == pytest.approx(parts, rel=1e-4)


def test_every_preset_says_what_is_published_and_what_is_not():
    for name in TERMS:
        text = (EXPERIMENTS / "distillation" / f"{name}.yaml").read_text()
        head = text.partition("\nmodel:")[0]
        assert "# Published:" in head and "# Different:" in head, name


def test_every_preset_of_the_folder_is_tested():
    files = {path.stem for path in (EXPERIMENTS / "distillation").glob("*.yaml")}
    assert files == {*TERMS, "teacher", "mind-the-gap"}
    for name in TERMS:
        raw = yaml.safe_load((EXPERIMENTS / "distillation" / f"{name}.yaml").read_text())
        assert set(raw["distill"]["terms"]) == TERMS[name]


def test_an_unaligned_teacher_and_one_flag_over_a_preset(teachers, phantom_store, tmp_path):
    flags = [*SMALL, taught_by(teachers, "plain"), "--distill.terms.logit.temperature=3"]
    assert fit(phantom_store, tmp_path, "distillation/protokd.yaml", *flags) == 0
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["distill"]["terms"]["logit"]["init_args"]["temperature"] == 3
    assert config["distill"]["terms"]["logit"]["init_args"]["weight"] == 2.5


def test_student_of_another_backbone_width_and_sequences(teachers, phantom_store, tmp_path):
    """Levels are matched by stride: an RFNet of two sequences learns from a U-Net of four."""
    flags = [
        "--model.backbone=pmixseg.backbones.RFNet",
        "--model.backbone.width=4",
        "--model.combination=flair+t2",
        taught_by(teachers, "aligned"),
    ]
    assert fit(phantom_store, tmp_path, "distillation/acn.yaml", *flags) == 0
    student = load(tmp_path / "checkpoints" / "last.ckpt")
    assert student.modalities == ("flair", "t2")
    assert math.isfinite(metrics(tmp_path)["train/distill/variational"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data.task.modalities=[t1,t2,flair,t1ce]"], "labels|modalities"),
        (["--distill.teacher=nowhere.ckpt"], "does not exist"),
    ],
)
def test_impossible_teachers_are_one_sentence(
    flags, words, teachers, phantom_store, tmp_path, capsys
):
    words_of_fit = [*SMALL, taught_by(teachers, "plain"), *flags]
    assert fit(phantom_store, tmp_path, "distillation/acn.yaml", *words_of_fit) == 1
    said = capsys.readouterr().err
    assert any(word in said for word in words.split("|"))
    assert "Traceback" not in said


NETWORK = {
    "class_path": "pmixseg.backbones.April2025Network",
    "init_args": {"arguments": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}},
}
NARROW = [f"--model.backbone.network={json.dumps(NETWORK)}"]


@pytest.mark.parametrize(
    ("name", "flags", "kind"),
    [
        ("official-2025-07", SMALL_UNET, July2025Student),
        ("repaired", SMALL_UNET, StudentModule),
    ],
)
def test_july_and_the_repaired_default_train_and_load(name, flags, kind, phantom_store, tmp_path):
    assert fit(phantom_store, tmp_path, f"official/{name}.yaml", *flags) == 0
    assert math.isfinite(metrics(tmp_path)["train/align"])
    module = load(tmp_path / "checkpoints" / "last.ckpt")
    assert type(module) is kind


def test_april_trains_and_loads(phantom_store, tmp_path):
    assert fit(phantom_store, tmp_path, "official/official-2025-04.yaml", *NARROW) == 0
    assert metrics(tmp_path)["train/align"] > 0
    module = load(tmp_path / "checkpoints" / "last.ckpt")
    assert isinstance(module.backbone.network, April2025Network)
    assert (module.backbone.channels[0], module.backbone.strides[0]) == (4, 1)


def test_april_alignment_has_four_weights_that_are_trained(phantom_store, tmp_path):
    fit(phantom_store, tmp_path, "official/official-2025-04.yaml", *NARROW)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert state["terms.align.alignment.scores"].shape == (4,)
    assert April2025Alignment().scores.requires_grad


@pytest.mark.parametrize(
    ("files", "flags", "words"),
    [
        (["official/official-2025-07.yaml"], [*SMALL_UNET, "--align.distance=mse"], "whole loss"),
        (
            ["official/repaired.yaml"],
            [*SMALL_UNET, "--align.official=pmixseg.losses.April2025Alignment"],
            "one fused latent apart",
        ),
        (
            ["official/official-2025-04.yaml"],
            [*NARROW, "--align.official=pmixseg.losses.July2025Alignment"],
            "mixes the modalities at its input",
        ),
    ],
)
def test_wrong_mixtures_are_one_sentence(files, flags, words, phantom_store, tmp_path, capsys):
    assert fit(phantom_store, tmp_path, *files, *flags) == 1
    assert words in capsys.readouterr().err
