"""The gap monitor: what it logs and draws, and that it changes nothing."""

import json
import math
import shutil
import warnings

import matplotlib.image
import pandas as pd
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from pmixseg.backbones import EarlyFusion, MultiEncoderUNet
from pmixseg.callbacks import GapMonitor, PmixAlignment, RunCheckpoint, RunLogger
from pmixseg.callbacks.gap import read_reference
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.data.masks import MaskFile
from pmixseg.data.splits import WholeCohort
from pmixseg.errors import InputError
from pmixseg.evaluation.gap.changes import read_gap_changes
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.modules import StudentModule
from pmixseg.task import BRATS
from tests.processes import spread

pytestmark = pytest.mark.long

MEASURES = 14  # ten of the gap, decodability of three regions and their mean
GUARDS = ("ratio", "whitened", "rank_within", "decodability", "collapsed")
COMBINATIONS = 10  # of two or three of four modalities
DRAWN = EvaluationSettings(window=(32, 40, 32), validation="drawn")


def train(
    store, folder, *callbacks, epochs=1, logger=None, backbone=None, resume=None, sanity=0, **data
):
    torch.manual_seed(3)
    net = backbone or MultiEncoderUNet(BRATS.modalities, 4, width=4, levels=2, dropout=0.2)
    module = StudentModule(backbone=net, evaluation=DRAWN)
    settings = {"patch_size": 16, "batch_size": 2, "val_cases": 2, "seed": 9, **data}
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[PmixAlignment(weight=0.5), *callbacks, RunCheckpoint(folder)],
        logger=RunLogger(folder) if logger is None else logger,
        limit_train_batches=2,
        num_sanity_val_steps=sanity,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, BraTSDataModule(store, **settings), ckpt_path=resume, weights_only=True)
    return module, trainer


@pytest.fixture(scope="module")
def run(phantom_store, tmp_path_factory):
    """Folder, trainer and module of a training, and what random numbers came after it."""
    folder = tmp_path_factory.mktemp("gap") / "run"
    module, trainer = train(phantom_store, folder, GapMonitor(cases=2), epochs=2, sanity=1)
    return folder, trainer, module, torch.rand(3)


def test_every_level_before_training_and_after_every_validation(run):
    table = pd.read_csv(run[0] / "metrics.csv")
    measured = table.dropna(subset=["gap/level1/ratio"])
    assert measured["epoch"].tolist() == [-1, 0, 1]
    for level in (0, 1):
        prefix = f"gap/level{level}/"
        mine = [c for c in table.columns if c.startswith(prefix)]
        assert len(mine) == MEASURES + 1 + COMBINATIONS
        assert measured[mine].notna().all(axis=None)
        assert (measured[prefix + "variance"] > 0).all()
        share = measured[prefix + "numerator"] / measured[prefix + "variance"]
        assert share.to_numpy() == pytest.approx(measured[prefix + "ratio"].to_numpy())
    both = (measured["gap/level0/ratio"] + measured["gap/level1/ratio"]) / 2
    assert both.to_numpy() == pytest.approx(measured["gap/ratio"].to_numpy())
    assert measured["val/dice"].notna().tolist() == [False, True, True]
    assert "gap/ratio" in run[1].callback_metrics  # a sweep or a checkpoint may follow it


def test_pictures_are_drawn_before_and_after(run):
    for name in ("before", "after"):
        pixels = matplotlib.image.imread(run[0] / "gap" / f"{name}.png")
        assert pixels.shape[0] > 300
        assert pixels[..., :3].std() > 0.01


def test_changes_first_and_last_or_best(run, tmp_path):
    table = pd.read_csv(run[0] / "metrics.csv")
    deep = read_gap_changes(run[0])[1]
    measured = table["gap/level1/ratio"].dropna()
    assert deep.level == 1
    assert (deep.before["ratio"], deep.after["ratio"]) == (measured.iloc[0], measured.iloc[-1])
    table.loc[table["epoch"] == 0, "val/dice"] = 0.99
    table.to_csv(tmp_path / "metrics.csv", index=False)
    assert read_gap_changes(tmp_path, best=True)[1].after["ratio"] == measured.iloc[1]
    assert read_gap_changes(tmp_path / "none") == []


def test_it_changes_no_weight_and_no_random_number(run, phantom_store, tmp_path):
    _, _, with_it, after_it = run
    without, _ = train(phantom_store, tmp_path, epochs=2, sanity=1)
    assert torch.equal(after_it, torch.rand(3))
    assert without.state_dict().keys() == with_it.state_dict().keys()
    for name, value in without.state_dict().items():
        assert torch.equal(value, with_it.state_dict()[name]), name
    modes = [part.training for part in with_it.modules()]
    assert modes == [part.training for part in without.modules()]


def test_resumed_training_keeps_its_log_and_its_guard(phantom_store, tmp_path):
    train(phantom_store, tmp_path, GapMonitor(cases=1))
    monitor = GapMonitor(cases=1)
    last = tmp_path / "checkpoints" / "last.ckpt"
    train(phantom_store, tmp_path, monitor, epochs=2, resume=last)
    table = pd.read_csv(tmp_path / "metrics.csv").dropna(subset=["gap/ratio"])
    assert table["epoch"].tolist() == [-1, 0, 1]
    assert monitor._guard["gap/level1/rank_within"] == table["gap/level1/rank_within"].iloc[0]


class Shrink(GapMonitor):
    """Makes all channels of the encoders' layers the same before training ends: a collapse."""

    def on_train_epoch_end(self, trainer, pl_module):
        for encoder in pl_module.backbone.encoders:
            for parameter in encoder.parameters():
                parameter.data.copy_(parameter.data[:1].expand_as(parameter))


def test_collapse_is_declared_against_the_start_or_a_reference(phantom_store, tmp_path, recwarn):
    train(phantom_store, tmp_path / "a", Shrink(cases=1, pictures=False))
    row = pd.read_csv(tmp_path / "a" / "metrics.csv").dropna(subset=["gap/ratio"])
    assert row["gap/level1/collapsed"].tolist() == [0, 0]  # validated before it shrank
    train(phantom_store, tmp_path / "b", Shrink(cases=1, pictures=False, every=9))
    row = pd.read_csv(tmp_path / "b" / "metrics.csv").dropna(subset=["gap/ratio"])
    assert row["gap/level1/collapsed"].tolist() == [0, 1]  # measured at the end of training
    assert row["val/dice"].isna().all()  # of the best epoch as well, which was not measured before
    after = read_gap_changes(tmp_path / "b", best=True)[1].after["ratio"]
    assert after == row["gap/level1/ratio"].iloc[-1]
    assert any("latents collapse" in str(w.message) for w in recwarn)
    reference = read_reference(tmp_path / "a")
    high = pd.read_csv(tmp_path / "a" / "metrics.csv")
    for name in reference:
        high[name] *= 1000
    (tmp_path / "high").mkdir()
    high.to_csv(tmp_path / "high" / "metrics.csv", index=False)
    compared = GapMonitor(cases=1, pictures=False, reference=tmp_path / "high")
    train(phantom_store, tmp_path / "c", compared)
    row = pd.read_csv(tmp_path / "c" / "metrics.csv").dropna(subset=["gap/ratio"])
    assert row["gap/level0/collapsed"].tolist() == [1, 1]
    assert read_gap_changes(tmp_path / "c")[0].collapsed


def test_a_monitor_of_the_default_judges_both_guards():
    monitor = GapMonitor()
    monitor._images, monitor._samples = [torch.zeros(0)] * monitor.cases, {1: None}
    good = {"gap/level1/rank_within": 8.0, "gap/level1/decodability": 0.6}
    monitor._guard = good
    for lost in (*good, None):
        values = {name: value / 3 if name == lost else value for name, value in good.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = monitor._collapses(values)
        assert said == {"gap/level1/collapsed": float(lost is not None)}


def test_averaged_weights_are_measured_where_they_are_scored(phantom_store, tmp_path):
    with pytest.raises(InputError, match=r"EMAWeightAveraging .* list it after"):
        train(phantom_store, tmp_path, EMAWeightAveraging(), GapMonitor(cases=1))
    # A decay of 1 keeps the weights of the first step: every validation scores and measures these.
    train(phantom_store, tmp_path, GapMonitor(cases=1), EMAWeightAveraging(decay=1.0), epochs=2)
    table = pd.read_csv(tmp_path / "metrics.csv").dropna(subset=["gap/ratio"])
    before, *scored = table["gap/ratio"].tolist()
    assert scored[0] == scored[1] != before


def test_tensorboard_gets_numbers_and_pictures(phantom_store, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="tb", version="")
    train(phantom_store, tmp_path, GapMonitor(cases=1), logger=logger)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert {f"gap/level1/{name}" for name in GUARDS} <= set(events.Tags()["scalars"])
    assert set(events.Tags()["images"]) == {"gap/before", "gap/after"}
    assert not (tmp_path / "gap").exists()


def test_wandb_gets_numbers_and_pictures(phantom_store, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=str(tmp_path), offline=True, project="test")
    train(phantom_store, tmp_path, GapMonitor(cases=1), logger=[logger, RunLogger(tmp_path)])
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert all(math.isfinite(summary[f"gap/level1/{name}"]) for name in GUARDS)
    assert summary["gap/after"]["_type"] == "images/separated"
    assert len(list(tmp_path.rglob("media/images/gap/*.png"))) == 2
    assert (tmp_path / "gap" / "after.png").is_file()


@pytest.mark.parametrize(
    ("make", "data", "words"),
    [
        (lambda: GapMonitor(levels=[7]), {}, "levels"),
        (lambda: GapMonitor(every=0), {}, "1 or more"),
        (lambda: GapMonitor(reference="nowhere"), {}, "cannot be read"),
        (lambda: GapMonitor(), {"split": WholeCohort()}, "no validation case has all"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(make, data, words, phantom_store, tmp_path):
    with pytest.raises(InputError, match=words):
        train(phantom_store, tmp_path, make(), **data)


def test_one_fused_latent_has_no_gap(phantom_store, tmp_path):
    network = {"class_path": "monai.networks.nets.UNet"}
    network["init_args"] = {"channels": [4, 4], "strides": [2]}
    with pytest.raises(InputError, match="'fused'"):
        trainer = Trainer(
            accelerator="cpu",
            callbacks=[GapMonitor()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            default_root_dir=tmp_path,
            max_epochs=1,
        )
        data = BraTSDataModule(phantom_store, patch_size=16, val_cases=1)
        trainer.fit(StudentModule(backbone=EarlyFusion(network)), data)


def test_incomplete_cases_are_left_out(phantom_store, tmp_path):
    data = BraTSDataModule(phantom_store, patch_size=16)
    data.setup("fit")
    listed = {item["case_id"]: "t1+t2" for item in data.items("val")}
    (tmp_path / "masks.json").write_text(json.dumps(listed))
    masks = MaskFile(tmp_path / "masks.json")
    with pytest.raises(InputError, match="no validation case has all"):
        train(phantom_store, tmp_path, GapMonitor(), masks=masks)


@pytest.mark.ddp
def test_two_processes_log_what_one_does(phantom_store, tmp_path):
    tables = []
    for processes in (1, 2):
        folder = tmp_path / f"of{processes}"
        torch.manual_seed(3)
        net = MultiEncoderUNet(BRATS.modalities, 4, width=4, levels=2)
        module = StudentModule(backbone=net, evaluation=DRAWN)
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=[GapMonitor(cases=2)],
            logger=RunLogger(folder),
            limit_train_batches=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            **spread(processes),
        )
        data = BraTSDataModule(phantom_store, patch_size=16, batch_size=2 // processes, val_cases=2)
        trainer.fit(module, data)
        tables.append(pd.read_csv(folder / "metrics.csv"))
        assert (folder / "gap" / "after.png").is_file()
        shutil.rmtree(folder / "gap")
    names = [c for c in tables[0] if c.startswith("gap/")]
    before = [t[t["epoch"] == -1][names] for t in tables]
    pd.testing.assert_frame_equal(*before)  # the same cases, whatever rank they are dealt to
    assert all(len(t.dropna(subset=["gap/ratio"])) == 2 for t in tables)


def test_a_picture_that_cannot_be_written_stops_no_training(phantom_store, tmp_path):
    (tmp_path / "gap").touch()
    with pytest.warns(UserWarning, match=r"before\.png cannot be written \(File exists\)"):
        train(phantom_store, tmp_path, GapMonitor(cases=1))
    assert "gap/ratio" in pd.read_csv(tmp_path / "metrics.csv")
