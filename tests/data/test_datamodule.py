import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import default_collate

from pmixseg.data.augment import Augmentation
from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.data.keys import make_key
from pmixseg.data.masks import RandomMasks
from pmixseg.data.parts import PUBLISHED, Split
from pmixseg.data.patches import CaseDataset, PatchDataset
from pmixseg.data.sampling import EpochSampler
from pmixseg.data.splits import Fractions, KFold, SplitJson, WholeCohort
from pmixseg.data.store.store import Store, prepare
from pmixseg.data.torchio_transform import TorchIOTransform
from pmixseg.errors import InputError
from pmixseg.task import BRATS

META = torch.device("meta")

REAL = Path(__file__).parents[2] / "../shared/data/brats2021"
SMALL = {"patch_size": 16, "patches_per_case": 2, "batch_size": 2}


def fingerprint(image):
    return hashlib.sha256(image.numpy().tobytes()).hexdigest()


class Recorder(LightningModule):
    """Writes down what it is given; trains one number."""

    def __init__(self, out: Path | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.out = out
        self.seen: list[dict] = []

    def note(self, kind, batch):
        names = batch["case_id"]
        keys = batch["key"].reshape(-1).tolist()
        self.seen.append(
            {
                "kind": kind,
                "epoch": self.current_epoch,
                "cases": [names] if isinstance(names, str) else names,
                "keys": keys,
                "image": fingerprint(batch["image"]),
            }
        )

    def training_step(self, batch, batch_idx):
        self.note("train", batch)
        return self.weight * batch["image"].mean()

    def validation_step(self, item, batch_idx):
        self.note("val", item)
        assert item["stored"].case_id == item["case_id"]

    def test_step(self, item, batch_idx):
        self.note("test", item)

    def predict_step(self, item, batch_idx):
        self.note("predict", item)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_fit_end(self):
        if self.out is not None:
            (self.out / f"{self.global_rank}.json").write_text(json.dumps(self.seen))

    def on_test_end(self):
        if self.out is not None:
            (self.out / f"test{self.global_rank}.json").write_text(json.dumps(self.seen))


def trainer(**kwargs):
    defaults = {
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**defaults, **kwargs})


def of(seen, kind, epoch=None):
    return [s for s in seen if s["kind"] == kind and epoch in (None, s["epoch"])]


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_reach_the_keys_also_in_workers_that_live_on(phantom_store, workers):
    data = BraTSDataModule(phantom_store, num_workers=workers, seed=7, **SMALL)
    module = Recorder()
    trainer().fit(module, data)
    n = len(data.parts.train)
    total = -(-2 * n // 2) * 2
    for epoch in (0, 1):
        keys = [k for s in of(module.seen, "train", epoch) for k in s["keys"]]
        assert sorted(keys) == sorted(make_key(7, epoch, i) for i in range(total))
    first, second = ([c for s in of(module.seen, "train", e) for c in s["cases"]] for e in (0, 1))
    assert first != second
    assert set(first) == set(data.parts.train)


def test_training_batches_are_augmented_and_no_others(phantom_root, tmp_path):
    cases = find_cases(phantom_root, BRATS)[:5]
    spacing = (5.0, 5.0, 10.0)
    prepare(cases, tmp_path / "store", BRATS, spacing=spacing, progress=False)
    augment = Augmentation(resample=1.0)
    data = BraTSDataModule(
        tmp_path / "store", **SMALL, seed=5, augmentation=augment, split=Fractions(0.6, 0.2, 0.2)
    )
    module = Recorder()
    trainer(max_epochs=1).fit(module, data)
    raw = PatchDataset(data.store, data.parts.train, (16,) * 3, 5, data.foreground)
    expected = []
    for a, b in zip(*[iter(EpochSampler(3, 2, 2, 5))] * 2, strict=True):
        batch = augment(default_collate([raw[a], raw[b]]), spacing=spacing)
        expected.append(fingerprint(batch["image"]))
    assert [s["image"] for s in of(module.seen, "train")] == expected
    whole = CaseDataset(data.store, data.parts.val)
    assert [s["image"] for s in of(module.seen, "val")] == [fingerprint(w["image"]) for w in whole]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("val", "when"),
    [
        (0.0, {}),
        (0.2, {}),
        (0.2, {"save_on_train_epoch_end": True}),
        (0.2, {"every_n_train_steps": 5}),
    ],
    ids=["no validation", "after validation", "after the epoch", "after the last step"],
)
def test_resuming_from_an_epoch_end_repeats_the_batches(
    phantom_store, tmp_path, workers, val, when
):
    def run(checkpoint=None):
        module = Recorder()
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, **when)
        data = BraTSDataModule(
            phantom_store, num_workers=workers, split=Fractions(0.8 - val, val, 0.2), **SMALL
        )
        trainer(max_epochs=3, enable_checkpointing=True, callbacks=[keep]).fit(
            module, data, ckpt_path=checkpoint, weights_only=True
        )
        return of(module.seen, "train")

    through = run()
    resumed = run(tmp_path / "epoch=0.ckpt")
    assert resumed == [s for s in through if s["epoch"] > 0]
    assert len(resumed) == 2 * len(through) // 3 > 0


def test_global_seeds_play_no_part(phantom_store):
    prints = []
    for seed in (1, 2):
        seed_everything(seed, verbose=False)
        module = Recorder()
        trainer(max_epochs=1).fit(module, BraTSDataModule(phantom_store, seed=3, **SMALL))
        prints.append([s["image"] for s in module.seen])
    assert prints[0] == prints[1]


@pytest.mark.ddp
def test_two_ranks_share_an_epoch(phantom_store, tmp_path):
    # Lightning's own samplers would be put in by default; they are not, for these.
    data = BraTSDataModule(phantom_store, split=KFold(0, 2, 0.3), **SMALL)
    together = trainer(devices=2, strategy="ddp_fork")
    together.fit(Recorder(tmp_path), data)
    together.test(Recorder(tmp_path), data, verbose=False)
    ranks = [json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1)]
    alone = Recorder()
    single = BraTSDataModule(phantom_store, split=KFold(0, 2, 0.3), **{**SMALL, "batch_size": 4})
    trainer().fit(alone, single)
    for epoch in (0, 1):
        steps = [of(r, "train", epoch) for r in ranks]
        assert len(steps[0]) == len(steps[1])
        joined = [a["keys"] + b["keys"] for a, b in zip(*steps, strict=True)]
        assert joined == [s["keys"] for s in of(alone.seen, "train", epoch)]
    tested = [json.loads((tmp_path / f"test{r}.json").read_text()) for r in (0, 1)]
    cases = [c for r in tested for s in of(r, "test") for c in s["cases"]]
    assert sorted(cases) == sorted(single.parts.test)
    assert len(set(cases)) == len(cases) == 4


def test_test_and_predict_read_the_cases_of_the_test(phantom_store):
    data = BraTSDataModule(phantom_store, **SMALL)
    module = Recorder()
    trainer().test(module, data, verbose=False)
    trainer().predict(module, data)
    tested = [s["cases"][0] for s in of(module.seen, "test")]
    assert tested == [s["cases"][0] for s in of(module.seen, "predict")] == list(data.parts.test)
    everything = BraTSDataModule(phantom_store, predict_part="all", **SMALL)
    module = Recorder()
    trainer().predict(module, everything)
    assert len(module.seen) == 8
    # A case has the same draws whatever is tested beside it.
    keys = {s["cases"][0]: s["keys"] for s in module.seen}
    assert keys[tested[0]] == [make_key(0, None, int.from_bytes(tested[0].encode()))]


def test_moving_to_a_device_leaves_the_stored_case_alone(phantom_store):
    data = BraTSDataModule(phantom_store, **SMALL)
    data.setup("test")
    item = next(iter(data.test_dataloader()))
    moved = data.transfer_batch_to_device(item, META, 0)
    assert moved["image"].device.type == moved["label"].device.type == "meta"
    assert moved["stored"] is item["stored"]
    assert moved["key"] is item["key"]  # a CPU draws from it


def test_training_batches_reach_a_gpu_with_what_is_shown(phantom_store):
    """Drawn on the CPU: on the device it would be forty operations, and a wait for the key."""
    data, shown = BraTSDataModule(phantom_store, **SMALL), []

    def show(batch):
        shown.append(batch["acquired"].device.type)
        return {**batch, "present": batch["acquired"]}

    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(with_present=show), training=True
    )
    data.setup("fit")
    moved = data.transfer_batch_to_device(next(iter(data.train_dataloader())), META, 0)
    assert moved["present"].device == moved["acquired"].device == META
    assert shown == ["cpu"]
    data.trainer.training = False
    item = next(iter(data.val_dataloader()))
    assert "present" not in data.transfer_batch_to_device(item, META, 0)


def test_validation_cases_are_few_and_always_the_same(phantom_store):
    def chosen(n):
        data = BraTSDataModule(phantom_store, split=WholeCohort("val"), val_cases=n, **SMALL)
        data.setup("validate")
        return [item["case_id"] for item in data.val_dataloader()]

    assert len(chosen(None)) == 8
    assert len(chosen(3)) == 3 and chosen(3) == chosen(3)
    assert set(chosen(2)) < set(chosen(3))
    assert BraTSDataModule(phantom_store, split=KFold(0, 4, 0.0), **SMALL).val_dataloader() == []


def test_masks_narrow_what_is_acquired(phantom_store, tmp_path):
    name = Store.open(phantom_store).cases[0]
    (tmp_path / "masks.json").write_text(json.dumps({name: "t1+t2"}))
    data = BraTSDataModule(
        phantom_store, split=WholeCohort("train"), mask_file=tmp_path / "masks.json", **SMALL
    )
    data.setup("fit")
    seen = 0
    for batch in data.train_dataloader():
        for case, acquired, image in zip(
            batch["case_id"], batch["acquired"], batch["image"], strict=True
        ):
            if case == name:
                seen += 1
                assert acquired.tolist() == [False, False, True, True]
                assert not image[:2].any()
            else:
                assert acquired.all()
    assert seen == 2
    rates = BraTSDataModule(
        phantom_store, split=WholeCohort("test"), masks=RandomMasks(0.5), **SMALL
    )
    rates.setup("test")
    assert not all(item["acquired"].all() for item in rates.test_dataloader())


def test_root_is_prepared_beside_it_once(phantom_root, tmp_path, caplog):
    root = tmp_path / "cohort"
    shutil.copytree(phantom_root, root)
    late = next((root / "HGG").iterdir())
    late.rename(tmp_path / late.name)
    data = BraTSDataModule(root=root, spacing=(10, 10, 10.0), **SMALL)
    data.prepare_data()
    assert data.store_path == tmp_path / "cohort-store-10x10x10"
    assert data.spacing == (10.0, 10.0, 10.0) and len(data.store.cases) == 7
    with caplog.at_level("INFO"):
        BraTSDataModule(root=root, spacing=(10, 10, 10.0)).prepare_data()
    assert "0 prepared, 7 up to date" in caplog.text
    (tmp_path / late.name).rename(late)
    data.prepare_data()
    assert len(data.store.cases) == 8
    scan = next(root.glob("*/*/*_t1ce.nii.gz"))
    scan.write_bytes(scan.read_bytes()[:1000])
    with pytest.raises(InputError, match=f"1 case of .*{scan.parent.name}.*no root"):
        BraTSDataModule(root=root, spacing=(10, 10, 10.0)).prepare_data()


def test_a_case_that_left_the_root_is_not_used(phantom_root, tmp_path, caplog):
    root = tmp_path / "cohort"
    shutil.copytree(phantom_root, root)
    BraTSDataModule(root=root, **SMALL).prepare_data()
    late = next((root / "HGG").iterdir())
    shutil.rmtree(late)
    data = BraTSDataModule(root=root, predict_part="all", **SMALL)
    with caplog.at_level("INFO"):
        data.prepare_data()
    assert "1 case of the store is not under" in caplog.text
    data.setup("fit")
    used = {*data.parts.train, *data.parts.val, *data.parts.test}
    data.setup("predict")
    seen = {item["case_id"] for item in data.predict_dataloader()}
    assert late.name in data.store.cases
    assert used == seen == set(data.store.cases) - {late.name}


def test_a_published_split_is_named_in_the_log(phantom_store, tmp_path, monkeypatch, caplog):
    cases = Store.open(phantom_store).cases
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": cases[:5], "val": cases[5:6], "test": cases[6:]}))
    split = Split(cases[:5], cases[5:6], cases[6:])
    monkeypatch.setitem(PUBLISHED, split.hashes, "the phantom's split")
    data = BraTSDataModule(phantom_store, split=SplitJson(path))
    with caplog.at_level("INFO"):
        data.setup("fit")
    assert f"published split the phantom's split, 5 train, 1 val, 2 test, hash {split.hash}" in (
        caplog.text
    )
    assert data.split_name == "the phantom's split"


def test_transforms_of_torchio_take_the_place_of_ours(phantom_store):
    pytest.importorskip("torchio")
    affine = {"class_path": "torchio.RandomAffine", "init_args": {"degrees": 20}}
    noise = {"class_path": "torchio.RandomNoise", "init_args": {"std": [0.5, 0.5]}}
    made = TorchIOTransform([affine, noise])
    data = BraTSDataModule(phantom_store, **SMALL, augmentation=made)
    plain = BraTSDataModule(phantom_store, **SMALL, augmentation=None)
    module, other, without = Recorder(), Recorder(), Recorder()
    trainer(max_epochs=1).fit(module, data)
    torch.manual_seed(99)
    trainer(max_epochs=1).fit(other, data)
    trainer(max_epochs=1).fit(without, plain)
    one, two, three = ([s["image"] for s in of(m.seen, "train")] for m in (module, other, without))
    assert one == two
    assert not set(one) & set(three)
    image, label = torch.rand(4, 8, 8, 8), torch.randint(0, 4, (8, 8, 8))
    before = torch.random.get_rng_state()
    out, out_label = made(image.clone(), label.clone(), key=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert set(out_label.unique().tolist()) <= {0, 1, 2, 3} and out.shape == image.shape
    with pytest.raises(InputError, match="Linear"):
        TorchIOTransform(
            [{"class_path": "torch.nn.Linear", "init_args": {"in_features": 1, "out_features": 1}}]
        )
    crop = TorchIOTransform([{"class_path": "torchio.Crop", "init_args": {"cropping": 1}}])
    with pytest.raises(InputError, match="keep the shape"):
        crop(image, label, key=0)


def test_unlabelled_cases_cannot_train(phantom_root, tmp_path):
    root = tmp_path / "cohort"
    shutil.copytree(phantom_root, root)
    removed = sorted(root.glob("HGG/*/*_seg.nii.gz"))[:2]
    for label in removed:
        label.unlink()
    data = BraTSDataModule(root=root, split=WholeCohort("train"))
    data.prepare_data()
    names = ", ".join(label.parent.name for label in removed)
    with pytest.raises(InputError, match=f"2 cases have no label .*: {names};"):
        data.setup("fit")
    tested = BraTSDataModule(data.store_path, split=WholeCohort("test"))
    tested.setup("test")
    assert sum("label" not in item for item in tested.test_dataloader()) == 2


@pytest.mark.real
@pytest.mark.skipif(not REAL.exists(), reason="../shared/data/brats2021 is not there")
def test_real_scans_become_batches(tmp_path):
    root = tmp_path / "two"
    root.mkdir()
    for name in ("BraTS2021_00000", "BraTS2021_00014"):
        (root / name).symlink_to((REAL / name).resolve())
    data = BraTSDataModule(
        root=root, spacing=(2, 2, 2), split=WholeCohort("train"), patch_size=48, foreground=1.0
    )
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 4, 48, 48, 48)
    assert batch["label"].flatten(1).any(1).all()
    assert set(batch["label"].unique().tolist()) <= {0, 1, 2, 3}
    brain = batch["image"][batch["image"] != 0]
    assert abs(brain.mean()) < 1 and 0.3 < brain.std() < 2
