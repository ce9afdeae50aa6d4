"""Arguments of the data module: from the command line, as descriptions, and impossible ones."""

import pytest
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

from pmixseg.data import splits
from pmixseg.data.augment import Augmentation
from pmixseg.data.datamodule import BraTSDataModule
from pmixseg.data.masks import RandomMasks
from pmixseg.data.splits import WholeCohort
from pmixseg.data.torchio_transform import TorchIOTransform
from pmixseg.errors import InputError
from pmixseg.task import BRATS, Task


def cli(*args):
    return LightningCLI(
        BoringModel, BraTSDataModule, run=False, save_config_callback=None, args=list(args)
    ).datamodule


def test_from_the_command_line_and_yaml(phantom_store, tmp_path):
    store = f"--data.store={phantom_store}"
    data = cli(store)
    assert isinstance(data.augmentation, Augmentation) and data.task == BRATS
    data = cli(store, "--data.split=KFold", "--data.split.fold=2", "--data.augmentation=null")
    assert data.split_plan.fold == 2 and data.augmentation is None
    data = cli(store, "--data.augmentation=Augmentation", "--data.augmentation.rotation=30")
    assert data.augmentation.rotation == 30
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
data:
  store: {phantom_store}
  patch_size: [16, 16, 24]
  split:
    class_path: pmixseg.data.splits.Fractions
    init_args: {{train: 0.5, val: 0.25, test: 0.25}}
  augmentation:
    class_path: pmixseg.data.torchio_transform.TorchIOTransform
    init_args:
      transforms:
        - class_path: torchio.RandomFlip
          init_args: {{axes: [0, 1]}}
  masks:
    class_path: pmixseg.data.masks.RandomMasks
    init_args: {{rates: {{t1: 0.2, t1ce: 0.4}}}}
"""
    )
    data = cli("--config", str(path), "--data.batch_size=1")
    assert isinstance(data.augmentation, TorchIOTransform) and data.batch_size == 1
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (1, 4, 16, 16, 24)


def test_descriptions_stand_for_objects(phantom_store):
    data = BraTSDataModule(
        phantom_store,
        split={"class_path": "pmixseg.data.splits.KFold", "init_args": {"fold": 1}},
        augmentation={
            "class_path": "pmixseg.data.augment.Augmentation",
            "init_args": {"flip": 0.0},
        },
        masks={"class_path": "pmixseg.data.masks.RandomMasks", "init_args": {"rates": 0.1}},
    )
    assert data.split_plan.fold == 1 and data.augmentation.flip == (0.0, 0.0, 0.0)
    assert isinstance(data.masks, RandomMasks)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "no data"),
        ({"store": "s", "mask_file": "m", "masks": RandomMasks(0.1)}, "both"),
        ({"store": "s", "batch_size": 0}, "batch_size is 0"),
        ({"store": "s", "foreground": 1.5}, "foreground is 1.5"),
        ({"store": "s", "patch_size": (8, 0, 8)}, "patch_size"),
    ],
)
def test_impossible_arguments_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        BraTSDataModule(**arguments)


def test_data_that_does_not_fit(phantom_store, tmp_path):
    with pytest.raises(InputError, match="not a prepared store"):
        BraTSDataModule(tmp_path / "none").setup("fit")
    with pytest.raises(InputError, match="prepared at spacing None"):
        BraTSDataModule(phantom_store, spacing=(2, 2, 2)).setup("fit")
    other = Task("ct", ("ct",), ("lesion",), {"L": ("lesion",)})
    with pytest.raises(InputError, match="task 'ct' has"):
        BraTSDataModule(phantom_store, task=other).setup("fit")
    (tmp_path / "train.txt").write_text("Brats18_nobody_1\nBrats18_noone_1\n")
    plan = splits.SplitFiles(tmp_path / "train.txt")
    with pytest.raises(InputError, match=r"2 cases .* lacks: Brats18_nobody_1, Brats18_noone_1"):
        BraTSDataModule(phantom_store, split=plan).setup("fit")
    only_test = BraTSDataModule(phantom_store, split=WholeCohort("test"))
    only_test.setup("fit")
    with pytest.raises(InputError, match="no training case"):
        only_test.train_dataloader()
    only_train = BraTSDataModule(phantom_store, split=WholeCohort("train"))
    with pytest.raises(InputError, match="no case in 'test'"):
        only_train.test_dataloader()


def test_a_patch_far_larger_than_every_case_is_told(phantom_store, recwarn):
    BraTSDataModule(phantom_store, patch_size=16).setup("fit")
    assert not [w for w in recwarn if "padding" in str(w.message)]
    large = BraTSDataModule(phantom_store, patch_size=(100, 100, 250), batch_size=2)
    told = r"of 100 × 100 × 250 voxels is [\d,]+ times as large .* a batch of 2 takes 0\.08 GB"
    with pytest.warns(UserWarning, match=told):  # 2 x 4 sequences x 2.5 million voxels x 4 bytes
        large.setup("fit")
