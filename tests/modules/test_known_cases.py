"""A test never scores patients that the model was trained on, without a word."""

import json
import re
import shutil

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from pmixseg.backbones import MultiEncoderUNet
from pmixseg.cli import main
from pmixseg.cli.checkpoint_settings import data_of
from pmixseg.data import BraTSDataModule, KFold, SplitLists, WholeCohort
from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.phantom.cohort import PhantomSettings, write_cohort
from pmixseg.data.store.store import Store, prepare
from pmixseg.data.store.stored import scan_hashes
from pmixseg.data.training_cases import TrainingCases
from pmixseg.errors import InputError
from pmixseg.evaluation.records.records import Records
from pmixseg.modules import StudentModule, load
from pmixseg.modules.checkpoint import read_checkpoint, write_checkpoint
from pmixseg.modules.preparation import Preparation
from pmixseg.task import BRATS
from tests.cli.presets import QUIET, TINY_UNET
from tests.evaluation.made_up import figures_left_empty

TINY = ["--model=StudentModule", *TINY_UNET, "--data.patch_size=16"]


@pytest.fixture(scope="module")
def store(phantom_store):
    return phantom_store


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    """A run whose split is not the default one."""
    run = tmp_path_factory.mktemp("known") / "run"
    flags = [*TINY, "--data.split=KFold", "--data.split.fold=1", "--data.split.folds=3"]
    flags += ["--data.split.val_fraction=0.25", "--trainer.max_steps=1"]
    flags += ["--trainer.limit_val_batches=1", "--model.evaluation.window=[32,40,32]"]
    assert main(["fit", f"--run={run}", f"--data.store={store}", *flags, *QUIET]) == 0
    return run / "checkpoints" / "last.ckpt"


@pytest.fixture
def score(trained, tmp_path, capsys):
    def call(command, *flags):
        code = main([command, f"--ckpt_path={trained}", f"--run={tmp_path / 'r'}", *flags, *QUIET])
        said = capsys.readouterr()
        return code, " ".join((said.out + said.err).split())

    return call


def cases_of(checkpoint):
    return TrainingCases.from_dict(read_checkpoint(checkpoint)["pmixseg"]["cases"], "x")


def trained_on_one_case(trained, store, folder, *flags):
    """The cases of a training that goes on with the first test case alone."""
    (folder / "train.txt").write_text(f"{cases_of(trained).test[0]}\n")
    split = ["--data.split=SplitFiles", f"--data.split.train={folder}/train.txt"]
    flags = (*flags, *TINY, *split, "--trainer.limit_val_batches=0", *QUIET)
    assert main(["fit", f"--run={folder / 'on'}", f"--data.store={store}", *flags]) == 0
    return cases_of(folder / "on" / "checkpoints" / "last.ckpt")


def test_a_checkpoint_holds_the_lists_and_what_tells_the_scans(trained, store):
    cases, opened = cases_of(trained), Store.open(store)
    assert sorted((*cases.train, *cases.val, *cases.test)) == sorted(opened.cases)
    assert set(cases.scans) == {*cases.train, *cases.val}
    assert cases.scans[cases.train[0]] == scan_hashes(opened.read(cases.train[0]).meta)
    assert cases.store == str(store)


def test_a_test_without_a_split_takes_store_and_split_of_the_training(trained, score, tmp_path):
    code, said = score("test")
    assert code == 0, said
    records = Records.read(tmp_path / "r")
    assert set(records.table["case"]) == set(cases_of(trained).test)
    assert records.sidecar.split == read_checkpoint(trained)["pmixseg"]["split"]
    assert list(records.sidecar.seen) == []


def test_a_test_records_what_the_training_s_split_lacked(trained, store, tmp_path):
    cases = cases_of(trained)
    (tmp_path / "train.txt").write_text(f"{cases.train[0]}\nnobody\n")
    (tmp_path / "test.txt").write_text(f"{cases.test[0]}\n")
    split = [f"--data.split.{part}={tmp_path}/{part}.txt" for part in ("train", "test")]
    flags = [*TINY, *split, "--data.split.missing=skip", "--trainer.limit_val_batches=0"]
    flags += ["--trainer.max_steps=1", "--model.evaluation.window=[32,40,32]"]
    run = f"--run={tmp_path / 'r'}"
    assert main(["fit", run, f"--data.store={store}", *flags, *QUIET]) == 0
    assert main(["test", run, "--ckpt_path=last", *QUIET]) == 0
    split = read_checkpoint(tmp_path / "r" / "checkpoints" / "last.ckpt")["pmixseg"]["split"]
    assert Records.read(tmp_path / "r").sidecar.split == split
    assert split.endswith(", 1 case lacking")


def test_a_process_on_its_own_writes_records_whatever_rank_its_environment_has(
    score, tmp_path, monkeypatch
):
    # As in one of several tasks of a SLURM job, each with a run of its own.
    monkeypatch.setattr(rank_zero_only, "rank", 3)
    code, said = score("test")
    assert code == 0, said
    assert Records.read(tmp_path / "r").sidecar.part == "test"


def test_validation_and_prediction_take_them_as_well(trained, score, tmp_path):
    code, said = score("validate")
    assert code == 0, said
    code, said = score("predict")
    assert code == 0, said
    written = {p.name.removesuffix("_seg.nii.gz") for p in (tmp_path / "r").rglob("*_seg.nii.gz")}
    assert written == set(cases_of(trained).test)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_case_that_was_trained_on_is_refused_by_name(trained, score, tmp_path, part):
    cases = cases_of(trained)
    known = getattr(cases, part)[0]
    (tmp_path / "test.txt").write_text(f"{known}\n{cases.test[0]}\n")
    split = ["--data.split=SplitFiles", f"--data.split.test={tmp_path}/test.txt"]
    code, said = score("test", *split)
    assert code == 1
    word = {"train": "training", "val": "validation"}[part]
    assert (
        f"1 case of the test part is known to this model from its training ({known} ({word})"
        in said
    )
    assert "--force" in said
    assert score("test", "--data.split=WholeCohort")[0] == 1


def test_validation_refuses_training_cases_and_takes_its_own(trained, score, tmp_path):
    cases = cases_of(trained)
    (tmp_path / "val.txt").write_text("\n".join((*cases.val, cases.train[0])))
    code, said = score(
        "validate", "--data.split=SplitFiles", f"--data.split.val={tmp_path}/val.txt"
    )
    assert code == 1
    assert (
        f"1 case of the val part is known to this model from its training ({cases.train[0]}" in said
    )


def test_the_same_scans_under_another_name_are_refused(trained, phantom_root, score, tmp_path):
    """A cohort whose folders and files were renamed, and one that was packed anew."""
    cases = cases_of(trained)
    known = cases.train[0]
    source = next(phantom_root.rglob(known))
    target = tmp_path / "renamed" / "HGG" / "Brats18_XYZ_1"
    target.mkdir(parents=True)
    for path in source.iterdir():
        shutil.copy(path, target / path.name.replace(known, "Brats18_XYZ_1"))
    again = tmp_path / "renamed-store"
    renamed = find_cases(tmp_path / "renamed", BRATS)
    assert not prepare(renamed, again, BRATS, progress=False).failed
    code, said = score("test", f"--data.store={again}", "--data.split=WholeCohort")
    assert code == 1
    assert f"Brats18_XYZ_1 (training, its scans are those of {known})" in said


def test_scans_that_were_packed_anew_are_known_by_their_content(store, phantom_root, tmp_path):
    import nibabel as nib

    name = Store.open(store).cases[0]
    source = next(phantom_root.rglob(name))
    target = tmp_path / "again" / "HGG" / name
    target.mkdir(parents=True)
    for path in source.iterdir():
        image = nib.load(path)
        image.header["descrip"] = b"saved again"
        nib.save(image, target / path.name)
    out = tmp_path / "store"
    assert not prepare(find_cases(tmp_path / "again", BRATS), out, BRATS, progress=False).failed
    one, two = (set(scan_hashes(Store.open(s).read(name).meta)) for s in (store, out))
    assert one != two
    assert one & two


def test_force_goes_on_and_records_and_report_say_so(trained, score, tmp_path, capsys):
    cases = cases_of(trained)
    (tmp_path / "test.txt").write_text(f"{cases.train[0]}\n{cases.test[0]}\n")
    split = ["--data.split=SplitFiles", f"--data.split.test={tmp_path}/test.txt"]
    code, said = score("test", "--force", *split)
    assert code == 0, said
    assert json.loads((tmp_path / "r" / "records.json").read_text())["seen"] == [cases.train[0]]
    with figures_left_empty():
        assert main(["report", str(tmp_path / "r"), "-o", str(tmp_path / "page.html")]) == 0
    other = Records.read(tmp_path / "r")
    other.table["dice"] /= 2
    other.write(tmp_path / "other" / "records.csv")
    assert main(["compare", "--a", str(tmp_path / "r"), "--b", str(tmp_path / "other")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "r: 1 of its test cases were used to train or select the model" in said
    page = " ".join((tmp_path / "page.html").read_text().split())
    assert "1 of its test cases were used to train" in page


@pytest.mark.parametrize("start", ["--init_from={}", "--distill.weight=1 --distill.teacher={}"])
def test_what_a_model_begins_with_or_is_taught_by_is_told_and_never_tested(
    start, trained, store, tmp_path, capsys
):
    first = cases_of(trained)
    parts = {"train": first.test[0], "val": first.train[1], "test": first.train[0]}
    flags = [*TINY, *start.format(trained).split(), "--data.split=SplitFiles"]
    for part, case in parts.items():
        (tmp_path / f"{part}.txt").write_text(f"{case}\n")
        flags.append(f"--data.split.{part}={tmp_path / part}.txt")
    run = tmp_path / "run"
    flags += [f"--run={run}", "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    with pytest.warns(UserWarning) as told:
        assert main(["fit", f"--data.store={store}", *flags, *QUIET]) == 0
    said = " ".join(str(warning.message) for warning in told)
    assert re.search(f"1 case of the test part trained .*{first.train[0]}", said)
    assert re.search(f"1 case of the val part trained .*{first.train[1]}.* val/dice is too", said)
    assert main(["test", f"--ckpt_path={run}/checkpoints/last.ckpt", *QUIET]) == 1
    assert f"{first.train[0]} (earlier training)" in capsys.readouterr().err


def test_what_weights_were_trained_with_before_is_not_forgotten(trained, store, tmp_path):
    first = cases_of(trained)
    flags = f"--init_from={trained}", "--trainer.max_steps=1"
    second = trained_on_one_case(trained, store, tmp_path, *flags)
    assert second.train == (first.test[0],)
    assert set(second.earlier) == {*first.train, *first.val}
    seen = second.seen({first.train[0]: ()})
    assert str(seen[0]) == f"{first.train[0]} (earlier training)"


def test_a_training_that_goes_on_with_another_split_says_so_and_forgets_no_case(
    trained, store, tmp_path, capfd, caplog
):
    first = cases_of(trained)
    flags = f"--ckpt_path={trained}", "--trainer.max_steps=2"
    with caplog.at_level("INFO"):
        second = trained_on_one_case(trained, store, tmp_path, *flags)
    captured = capfd.readouterr()
    said = captured.out + captured.err + caplog.text
    assert f"the checkpoint had {read_checkpoint(trained)['pmixseg']['split']}; no test" in said
    assert {*first.train, *first.val} <= {*second.train, *second.earlier}


def test_a_checkpoint_without_lists_refuses_a_split_that_it_did_not_have(
    trained, store, tmp_path, capsys
):
    checkpoint = read_checkpoint(trained)
    checkpoint["pmixseg"]["cases"] = None
    old = write_checkpoint(checkpoint, tmp_path / "old.ckpt")
    flags = [f"--ckpt_path={old}", f"--data.store={store}", f"--run={tmp_path / 'r'}", *QUIET]
    assert main(["test", *flags]) == 1
    assert "holds no lists of its cases" in capsys.readouterr().err
    split = ["--data.split=KFold", "--data.split.fold=1", "--data.split.folds=3"]
    split += ["--data.split.val_fraction=0.25", "--trainer.limit_test_batches=1"]
    with pytest.warns(UserWarning, match="does not say which cases it was trained on"):
        assert main(["test", *flags, *split]) == 0


def test_known_cases_are_refused_in_python_as_well(trained, store, tmp_path):
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    module = load(trained)
    data = BraTSDataModule(store, split=WholeCohort("test"), patch_size=16)
    with pytest.raises(InputError, match=r"module\.force = True"):
        trainer.test(module, data)
    net = MultiEncoderUNet(BRATS.modalities, 4, width=2, levels=2)
    with pytest.raises(InputError, match=r"module\.force = True"):
        trainer.test(StudentModule(backbone=net), data, ckpt_path=trained, weights_only=True)


def test_lists_that_are_of_another_cohort(store):
    cohort = [Store.open(store).read(name) for name in Store.open(store).cases]
    with pytest.raises(
        InputError, match=r"none of the 2 cases of the split in a\.ckpt; .*WholeCoh"
    ):
        SplitLists(["x"], test=["y"], source="a.ckpt").split(cohort)
    with pytest.raises(InputError, match="names 1 of 2 cases that the cohort lacks: x"):
        SplitLists(["x"], test=[cohort[0].case_id]).split(cohort)


def test_another_cohort_under_the_same_names_is_told_and_both_are_known(capfd, caplog):
    before = TrainingCases("a", ("x",), ("v",), scans={"x": ("1", "2"), "v": ("5",)})
    now = TrainingCases("b", ("x",), ("v",), scans={"x": ("3",), "v": ("4", "5")})
    assert now.replaced(before) == ["x"] and now.replaced(now) == []
    with caplog.at_level("INFO"):
        after = Preparation(cases=now).after(Preparation(cases=before)).cases
    assert "1 case has other scans in b than in the checkpoint's training, which read a (x)." in (
        capfd.readouterr().err + caplog.text
    )
    known = after.seen({"other name": ("1",), "third": ("3",), "x": ("9",), "new": ("7",)})
    assert [str(case) for case in known] == [
        "other name (training, its scans are those of x)",
        "third (training, its scans are those of x)",
        "x (training)",
    ]


def test_a_store_that_was_moved_is_named(tmp_path):
    cases = TrainingCases(str(tmp_path / "gone"), ("a",), test=("b",))
    with pytest.raises(InputError, match=r"x.ckpt was trained on the store .*gone, which is not"):
        data_of(cases, ["test", "--ckpt_path=x.ckpt"], "x.ckpt")
    assert "store" not in data_of(cases, ["test", "--data.store=s"], "x.ckpt")


def test_one_patient_under_two_names_in_two_parts_is_told(phantom_root, tmp_path, recwarn):
    first, second = sorted(phantom_root.glob("*/*_1"))[:2]
    for name, source in (("one", first), ("again", first), ("other", second)):
        for scan in sorted(source.iterdir()):
            copy = tmp_path / "cohort" / name / scan.name.replace(source.name, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(scan, copy)
    store = tmp_path / "store"
    assert not prepare(find_cases(tmp_path / "cohort", BRATS), store, BRATS, progress=False).failed
    together = {"train": ["one", "again"], "test": ["other"]}
    for lists, number in ((together, 0), ({"train": ["one", "other"], "test": ["again"]}, 1)):
        BraTSDataModule(store, patch_size=16, split=SplitLists(**lists)).setup("fit")
        told = [str(w.message) for w in recwarn if "the same scan" in str(w.message)]
        assert len(told) == number
    assert "1 pair of cases in different parts" in told[0]
    assert "(again and one)" in told[0]


def test_another_cohort_under_the_names_of_the_training_is_told(trained, score, tmp_path, recwarn):
    root = tmp_path / "other"
    write_cohort(root, 8, seed=8, settings=PhantomSettings(spacing=6.0))
    assert not prepare(find_cases(root, BRATS), tmp_path / "s", BRATS, progress=False).failed
    few = ["--trainer.limit_test_batches=1", "--model.evaluation.window=[16,16,16]"]
    assert score("test", f"--data.store={tmp_path / 's'}", *few)[0] == 0
    (told,) = [str(w.message) for w in recwarn if "have other scans" in str(w.message)]
    assert "the names of its split may be of other patients here" in told
    recwarn.clear()
    assert score("test", *few)[0] == 0
    assert not [w for w in recwarn if "have other scans" in str(w.message)]


class OwnCases(BraTSDataModule):
    """Tests on what it likes, in a loader that it likes."""

    def test_dataloader(self):
        return DataLoader(list(self.items("val")), batch_size=None)


@pytest.mark.parametrize("data", [OwnCases, None])
def test_a_known_case_is_refused_whatever_loader_brings_it(store, trained, tmp_path, data):
    module, split = load(trained), KFold(fold=1, folds=3, val_fraction=0.25)
    own = OwnCases(store, split=split, patch_size=16)
    given = {"datamodule": own} if data else {"dataloaders": own.test_dataloader()}
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = Trainer(default_root_dir=tmp_path, limit_test_batches=1, **options)
    with pytest.raises(InputError, match=r"1 case of the test part is known .* \(validation\)"):
        trainer.test(module, **given)
    module.force = True
    with pytest.warns(UserWarning, match="1 case is scored that the model knows"):
        trainer.test(module, verbose=False, **given)
    assert len(module.seen) == 1
