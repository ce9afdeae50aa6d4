"""Every backbone under every module, with and without alignment and distillation."""

import itertools

import pytest
import torch
from lightning.pytorch import Trainer

from pmixseg.callbacks import Distillation, PmixAlignment, RunCheckpoint
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.losses import DiceCE, LogitKL, MixtureAnchor
from pmixseg.modules import StudentModule, TeacherModule, load
from tests.inference import tiny_models as small

pytestmark = pytest.mark.long

BACKBONES = small.BACKBONES | {
    "early": (lambda: small.early("DynUNet", **small.DYNUNET), DiceCE, 16),
}


def is_quick(name, kind, align, distill):
    """One line through every backbone; the rest of the matrix is marked slow."""
    return kind is StudentModule and distill and align == (name != "early")


ROWS = itertools.product(BACKBONES, (TeacherModule, StudentModule), (False, True), (False, True))
ALL = [pytest.param(*r, marks=() if is_quick(*r) else pytest.mark.slow) for r in ROWS]


@pytest.fixture(scope="module")
def train(phantom_store):
    def fit(kind, name, folder, align=False, teacher=None):
        make, criterion, patch = BACKBONES[name]
        torch.manual_seed(0)
        module = kind(
            backbone=make(),
            criterion=criterion(),
            evaluation=EvaluationSettings(window=(32, 48, 32), overlap=0.0),
        )
        # They have a rule of their own for missing slots, so the module has no anchor to lend.
        own = name in ("uhved", "shaspec", "demoseg")
        anchor = MixtureAnchor(weights="uniform") if own else None
        terms = [PmixAlignment(weight=0.1, anchor=anchor)] if align else []
        if teacher is not None:
            # Latents of early fusion have no slots to match, so the logits alone teach it.
            losses = {"logit": LogitKL()} if name == "early" else None
            terms.append(Distillation(str(teacher), weight=1.0, terms=losses))
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=[*terms, RunCheckpoint(folder)],
            limit_train_batches=2,
            limit_val_batches=0,
            limit_test_batches=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        data = BraTSDataModule(phantom_store, patch_size=patch, batch_size=2)
        trainer.fit(module, data)
        return module, trainer, data

    return fit


@pytest.fixture(scope="module")
def teachers(train, tmp_path_factory):
    """One per backbone, made when first asked for."""
    made = {}

    def teacher(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            train(TeacherModule, name, folder)
            made[name] = folder / "checkpoints" / "last.ckpt"
        return made[name]

    return teacher


@pytest.mark.parametrize(("name", "kind", "align", "distill"), ALL)
def test_fits_two_batches_and_tests_a_case(train, teachers, tmp_path, name, kind, align, distill):
    if name == "early" and align:
        with pytest.raises(InputError, match="mixes"):
            train(kind, name, tmp_path, align)
        return
    module, trainer, data = train(kind, name, tmp_path, align, teachers(name) if distill else None)
    trainer.test(module, data, verbose=False)
    assert len(module.records) == 15 * 3
    assert set(module.terms) == {n for n, on in (("align", align), ("distill", distill)) if on}
    assert trainer.global_step == 2
    again = load(tmp_path / "checkpoints" / "last.ckpt")
    for ours, kept in zip(module.backbone.parameters(), again.backbone.parameters(), strict=True):
        assert torch.equal(ours, kept) and ours.isfinite().all()
