"""``val/dice`` is the mean over several combinations of every case."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from pmixseg.backbones import EarlyFusion, MultiEncoderUNet
from pmixseg.callbacks import GapMonitor, PmixAlignment, ProtocolScores
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.data.missing import Bernoulli, UniformCombinations
from pmixseg.data.splits import SplitLists
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.evaluation.scores.metrics import region_dice
from pmixseg.modules import StudentModule, TeacherModule
from pmixseg.task import BRATS, Task, balanced_combinations, format_combination
from tests.callbacks.memory_data import MemoryData, quiet_trainer, tiny

SEGRESNET = {
    "class_path": "monai.networks.nets.SegResNet",
    "init_args": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
}
FIVE = ["flair", "t1ce+t1+t2", "flair+t1ce", "t1+t2", "flair+t1ce+t1+t2"]


def student(validation="auto", backbone=None, **arguments):
    torch.manual_seed(0)
    return StudentModule(
        backbone=backbone or MultiEncoderUNet(width=4, levels=2),
        evaluation=EvaluationSettings(overlap=0.0, validation=validation),
        **arguments,
    )


def item_of(acquired=(True,) * 4, key=0):
    return {"case_id": "a", "acquired": torch.tensor(acquired), "key": torch.tensor(key)}


def names(module, item=None):
    return [format_combination(c) for c in module.validation_combinations(item or item_of())]


def test_all_combinations_where_one_encoding_serves_them_else_a_balanced_set():
    every = [format_combination(c) for c in BRATS.combinations()]
    fused = EarlyFusion(SEGRESNET)
    assert names(student()) == every and len(every) == 15
    assert names(student(backbone=fused)) == FIVE
    assert names(student("all", fused)) == every
    assert names(student("balanced")) == FIVE
    assert names(student(), item_of((True, False, False, True))) == ["flair", "t2", "flair+t2"]


def test_one_drawn_combination_is_that_of_the_sampler_and_of_the_key():
    module = student("drawn", sampler=Bernoulli({"flair": 0.9}))
    drawn = [names(module, item_of(key=key)) for key in range(40)]
    assert all(len(one) == 1 for one in drawn)
    assert {one[0] for one in drawn} == {"flair+t1ce+t1+t2", "t1ce+t1+t2"}
    assert drawn == [names(module, item_of(key=key)) for key in range(40)]


def test_what_is_trained_for_one_combination_is_validated_on_it():
    assert names(student(combination="t1+t2")) == ["t1+t2"]
    teacher = TeacherModule(backbone=MultiEncoderUNet(width=4, levels=2))
    assert names(teacher) == ["flair+t1ce+t1+t2"]
    assert names(teacher, item_of((True, False, True, True))) == ["flair+t1+t2"]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_a_balanced_set_shows_every_modality_equally_often(count):
    modalities = [f"m{k}" for k in range(count)]
    singles = set()
    for turn in range(count):
        chosen = balanced_combinations(modalities, turn)
        assert len(set(chosen)) == len(chosen)
        assert chosen[-1] == tuple(modalities) and all(chosen)
        shown = {m: sum(m in c for c in chosen) for m in modalities}
        assert len(set(shown.values())) == 1
        singles |= {c[0] for c in chosen if len(c) == 1}
    assert singles == set(modalities)


def test_six_modalities_are_not_validated_on_all_63():
    module = student()
    module.test_combinations = lambda item: [("flair",)] * 63
    assert names(module) == FIVE


def test_an_unknown_word_is_refused():
    with pytest.raises(InputError, match="validation is 'some'; give auto or all"):
        EvaluationSettings(validation="some")


def test_numbers_that_all_processes_share_are_logged_without_advice(
    phantom_store, tmp_path, recwarn
):
    """Lightning gives it wherever processes see each other, be it one that is alone."""
    protocols = ProtocolScores({"all": UniformCombinations()}, draws=8)
    watchers = [GapMonitor(cases=1, points=16, pictures=False), protocols]
    trainer = quiet_trainer(
        tmp_path,
        callbacks=[PmixAlignment(ratio=0.1, ratio_steps=1), *watchers],
        strategy=DDPStrategy(process_group_backend="gloo"),
        devices=1,
        limit_train_batches=1,
        limit_val_batches=1,
    )
    data = BraTSDataModule(phantom_store, patch_size=16, batch_size=2)
    module = StudentModule(backbone=tiny(levels=2))
    try:
        trainer.fit(module, data)
        logged = dict(trainer.callback_metrics)
        logged |= trainer.test(module, data, verbose=False)[0]
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert {"gap/ratio", "align/weight", "val/dice", "test/protocol/all", "test/dice"} <= {*logged}
    assert not [str(w.message) for w in recwarn if "sync_dist" in str(w.message)]


def test_the_logged_dice_is_the_mean_over_combinations_then_over_cases(phantom_store, tmp_path):
    module = student("balanced")
    data = BraTSDataModule(phantom_store, patch_size=16, batch_size=2)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    logged = trainer.validate(module, data, verbose=False)[0]
    assert set(logged) == {"val/dice", "val/dice/WT", "val/dice/TC", "val/dice/ET"}
    module.eval()
    means = []
    for item in data.val_dataloader():
        scores = []
        for combination in module.validation_combinations(item):
            prediction = next(iter(module.predict_item(item, [combination])))
            scores.append(region_dice(prediction.on_grid(), item["label"], BRATS)["WT"])
        means.append(sum(scores) / len(scores))
        assert len(scores) == 5
    assert logged["val/dice/WT"] == pytest.approx(sum(means) / len(means), rel=1e-5)


@pytest.mark.parametrize("regions", [["lesion"], ["lesion", "core"]])
def test_every_region_has_a_mean(regions, monkeypatch):
    task = Task("t", ("flair", "adc"), ("lesion", "core"), {r: (r,) for r in regions})
    module = StudentModule(
        task=task, backbone=MultiEncoderUNet(task.modalities, task.num_classes, width=2, levels=2)
    )
    logged = {}
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update(values))
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: value}))
    for case, dice in {"a": 0.5, "b": 0.7}.items():
        module.validation_dice.update(torch.full([len(regions)], dice), case)
    module.on_validation_epoch_end()
    expected = {"val/dice": 0.6, **{f"val/dice/{region}": 0.6 for region in regions}}
    assert {name: float(value) for name, value in logged.items()} == pytest.approx(expected)


class OwnSteps(StudentModule):
    def validation_step(self, batch, batch_idx):
        self.log("val/own", 1.0, batch_size=1)

    def test_step(self, batch, batch_idx):
        self.log("test/own", 2.0, batch_size=1)


@pytest.mark.parametrize(
    ("run", "logged"), [("validate", {"val/own": 1.0}), ("test", {"test/own": 2.0})]
)
def test_a_subclass_scores_in_its_own_way(tmp_path, run, logged):
    module = OwnSteps(backbone=MultiEncoderUNet(width=2, levels=2))
    trainer = quiet_trainer(tmp_path)
    loader = MemoryData().train_dataloader()
    assert getattr(trainer, run)(module, loader, verbose=False) == [logged]


class Apart(BraTSDataModule):
    """Gives each case in a loader of its own, as those of several sites may be."""

    def val_dataloader(self):
        return [self._whole([name]) for name in self.parts.val]

    def test_dataloader(self):
        return [self._whole([name]) for name in self.parts.test]


@pytest.mark.parametrize(("run", "part"), [("validate", "val"), ("test", "test")])
def test_several_loaders_are_scored_as_one(phantom_store, tmp_path, run, part):
    names = BraTSDataModule(phantom_store).cases[:2]
    module, means = student("balanced"), []
    for cls in (BraTSDataModule, Apart):
        data = cls(phantom_store, split=SplitLists(**{part: names}), patch_size=16)
        scores = getattr(quiet_trainer(tmp_path), run)(module, data, verbose=False)
        means.append(scores[0][f"{part}/dice"])
    assert means[0] == means[1] > 0
