"""fit → test → predict through the command line, on the phantom store."""

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import pmixseg.modules
from pmixseg.cli import main
from pmixseg.cli.training import SaveRunConfig
from pmixseg.cli.training_parser import TrainingParser
from pmixseg.data.store.store import Store
from pmixseg.evaluation.comparison.compare import matching_notes
from pmixseg.evaluation.records.records import Records
from pmixseg.evaluation.report.summary import remarks
from pmixseg.inference.publish import publish
from pmixseg.modules import StudentModule, TeacherModule, load
from pmixseg.modules.checkpoint import read_checkpoint
from tests.cli.presets import QUIET, last_of_each
from tests.inference.tiny_models import save, tiny_student

TINY = [
    "--model.backbone=MultiEncoderUNet",
    "--model.backbone.width=4",
    "--model.backbone.levels=2",
    "--model.evaluation.window=[32,40,32]",
    "--model.evaluation.validation=drawn",
    "--data.patch_size=16",
    "--data.val_cases=1",
    *QUIET,
    "--trainer.max_epochs=1",
    "--trainer.num_sanity_val_steps=0",
]


def fit(store, run, *flags):
    assert (
        main(["fit", f"--run={run}", f"--data.store={store}", *last_of_each([*TINY, *flags])]) == 0
    )


@pytest.fixture(scope="module")
def teacher_run(phantom_store, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "teacher"
    fit(phantom_store, run, "--model=TeacherModule", "--align.weight=0.1")
    return run


@pytest.fixture(scope="module")
def student_run(phantom_store, teacher_run):
    run = teacher_run.parent / "student"
    teacher = f"--distill.teacher={teacher_run}/checkpoints/last.ckpt"
    flags = ["--distill.weight=1", "--distill.terms.logit.temperature=7"]
    flags += ["--seed_everything=3", "--data.seed=5"]
    fit(phantom_store, run, "--model=StudentModule", teacher, *flags)
    return run


def test_a_new_training_in_the_folder_of_another_says_so(phantom_store, tmp_path, recwarn):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.ckpt").touch()
    short = ["--model=StudentModule", "--trainer.limit_train_batches=1"]
    short += ["--trainer.limit_val_batches=0"]
    fit(phantom_store, tmp_path, *short)
    fit(phantom_store, tmp_path, *short, "--ckpt_path=last", "--trainer.max_epochs=2")
    (said,) = (str(w.message) for w in recwarn if "earlier training" in str(w.message))
    assert said.startswith(f"{tmp_path} holds checkpoints of an earlier training, which this")


def test_fit_leaves_a_run(teacher_run):
    assert (teacher_run / "checkpoints" / "best.ckpt").is_file()
    assert (teacher_run / "checkpoints" / "last.ckpt").is_file()
    config = yaml.safe_load((teacher_run / "config.yaml").read_text())
    assert config["align"]["weight"] == 0.1
    metrics = pd.read_csv(teacher_run / "metrics.csv")
    for name in ("train/loss", "train/seg", "train/align", "val/dice", "val/dice/WT"):
        assert metrics[name].notna().any(), name


def test_checkpoint_holds_primitives_and_the_preparation(teacher_run):
    payload = read_checkpoint(teacher_run / "checkpoints" / "last.ckpt")["pmixseg"]
    assert payload["class_path"] == "pmixseg.TeacherModule"
    assert payload["patch"] == [16, 16, 16]
    assert payload["normalisation"] == "zscore-own-mask"
    assert payload["spacing"] is None
    assert payload["task"]["modalities"] == ["flair", "t1ce", "t1", "t2"]
    assert isinstance(load(teacher_run / "checkpoints" / "last.ckpt"), TeacherModule)


def test_nested_flag_reaches_a_distillation_term(student_run):
    config = yaml.safe_load((student_run / "config.yaml").read_text())
    assert config["distill"]["terms"]["logit"]["init_args"]["temperature"] == 7
    assert "latent" in config["distill"]["terms"]
    metrics = pd.read_csv(student_run / "metrics.csv")
    for name in ("train/distill", "train/distill/logit", "train/distill/latent"):
        assert metrics[name].notna().any(), name


def test_test_needs_only_checkpoint_and_data_and_scores_every_combination(
    student_run, phantom_store, capsys
):
    checkpoint = f"--ckpt_path={student_run}/checkpoints/last.ckpt"
    quiet = "--trainer.enable_progress_bar=false"
    assert main(["test", checkpoint, f"--data.store={phantom_store}", quiet]) == 0
    records = Records.read(student_run)
    table = records.table
    assert list(table.columns[:7]) == [
        "run", "case", "combination", "n_present", "region", "dice", "hd95",
    ]  # fmt: skip
    assert len(table) == table["case"].nunique() * 15 * 3
    assert set(table["run"]) == {"student"}
    assert records.sidecar.phantom is True
    assert records.sidecar.conventions["hd95_one_empty_mm"] == pytest.approx(373.12866)
    assert records.sidecar.checkpoint["file"] == "last.ckpt"
    # The seeds of the training, not of this test: compare matches runs by them.
    assert records.sidecar.config["seed"] == {"everything": 3, "data": 5}
    assert records.sidecar.config["split"] == records.sidecar.split  # chosen by nobody for the test
    printed = capsys.readouterr().out
    assert "WT" in printed
    assert "●" in printed
    assert "Test metric" not in printed  # of Lightning's table
    assert (student_run / "metrics.csv").is_file()  # testing forgets nothing of the training


@pytest.mark.parametrize("run", ["afile/run", "afile"])
def test_a_run_folder_that_cannot_be_made_is_one_sentence(phantom_store, tmp_path, capsys, run):
    (tmp_path / "afile").touch()
    command = ["fit", f"--run={tmp_path / run}", f"--data.store={phantom_store}", *TINY]
    assert main([*command, "--model=TeacherModule"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    reason = "Not a directory" if "/" in run else "File exists"
    assert said == (
        f"pmixseg: {tmp_path / run}/config.yaml cannot be written ({reason}); correct the path, "
        "or choose another folder."
    )


def test_settings_that_somebody_wrote_are_not_replaced(phantom_store, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("data: {batch_size: 1}  # mine")
    command = ["fit", f"--run={tmp_path}", f"--data.store={phantom_store}", *TINY]
    assert main([*command, "--model=TeacherModule", f"-c={tmp_path / 'config.yaml'}"]) == 1
    assert "config.yaml was written by no training and would be replaced" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text().endswith("# mine")


def test_weights_to_begin_with_and_a_training_to_go_on_with_are_refused(student_run, capsys):
    checkpoint = f"{student_run}/checkpoints/last.ckpt"
    command = ["fit", f"--init_from={checkpoint}", f"--ckpt_path={checkpoint}"]
    assert main([*command, "--model=StudentModule"]) == 2
    assert "goes on with one; give one of them." in capsys.readouterr().err


def test_pictures_that_cannot_be_written_cost_no_results(
    student_run, phantom_store, tmp_path, capsys
):
    (tmp_path / "slices").write_text("in the way")
    test = ["test", f"--ckpt_path={student_run}/checkpoints/last.ckpt", f"--run={tmp_path}"]
    test += [f"--data.store={phantom_store}", "--trainer.enable_progress_bar=false"]
    with pytest.warns(UserWarning, match=r"npz cannot be written \(File exists\).*no picture of"):
        whole = ["--force", "--data.split=WholeCohort"]
        assert main([*test, *whole, "--trainer.limit_test_batches=1"]) == 0
    records = Records.read(tmp_path)
    assert records.table["case"].nunique() == 1
    # A test of a part of the test cases says so, here and wherever its numbers are read.
    said = f"1 of {len(Store.open(phantom_store).cases)} cases of the part were scored"
    assert said in capsys.readouterr().out
    assert f"{tmp_path.name}: {said}" in " ".join(remarks([records]))
    other = replace(records, table=records.table.assign(dice=0.5, run="whole"))
    assert sum(said in note for note in matching_notes([records], [other])) == 2
    whole = replace(records, sidecar=replace(records.sidecar, part_size=1))
    assert "were scored" not in " ".join(remarks([whole]))


def test_predict_writes_nifti_that_overlays_its_source(
    student_run, phantom_store, phantom_root, caplog
):
    checkpoint = f"--ckpt_path={student_run}/checkpoints/last.ckpt"
    quiet = "--trainer.enable_progress_bar=false"
    with caplog.at_level("INFO"):
        assert main(["predict", checkpoint, f"--data.store={phantom_store}", quiet]) == 0
    assert f"Written: {student_run / 'predictions'}" in caplog.text
    written = sorted((student_run / "predictions").glob("*_seg.nii.gz"))
    assert written
    for path in written:
        case = path.name.removesuffix("_seg.nii.gz")
        source = nib.load(next(Path(phantom_root).rglob(f"{case}_flair.nii.gz")))
        labels = nib.load(path)
        assert labels.shape == source.shape
        np.testing.assert_allclose(labels.affine, source.affine)
        assert set(np.unique(labels.dataobj)) <= {0, 1, 2, 4}
        assert b"research use only" in labels.header["descrip"].item()


def test_parts_of_predict_join_to_all_cases(student_run, phantom_store, tmp_path, capsys, caplog):
    checkpoint = f"--ckpt_path={student_run}/checkpoints/last.ckpt"
    rest = [f"--data.store={phantom_store}", "--trainer.enable_progress_bar=false"]
    rest += [f"--run={tmp_path}", "--data.predict_part=train"]
    counts = []
    for part in ("1/2", "2/2", "9/9"):
        assert main(["predict", checkpoint, *rest, f"--part={part}"]) == 0
        counts.append(len(list((tmp_path / "predictions").glob("*_seg.nii.gz"))))
    trained = load(student_run / "checkpoints/last.ckpt").preparation.cases.train
    written = {p.name.removesuffix("_seg.nii.gz") for p in (tmp_path / "predictions").iterdir()}
    assert written == set(trained) and 0 < counts[0] < counts[1] == counts[2]
    assert "part 9/9 has no case" in caplog.text
    assert main(["test", checkpoint, *rest, "--part=1/2"]) == 1
    assert "--part is for predict, not for test" in capsys.readouterr().err


def test_a_published_model_to_start_from_and_to_learn_from(student_run, phantom_store, tmp_path):
    model = publish(student_run / "checkpoints/last.ckpt", tmp_path / "model")
    flags = [f"--init_from={model}", f"--distill.teacher={model}", "--distill.weight=1"]
    flags += ["--model.optimizer=SGD", "--model.optimizer.lr=1e-30", "--trainer.max_steps=1"]
    fit(phantom_store, tmp_path / "run", *flags, "--trainer.limit_val_batches=0")
    began, trained = (load(p) for p in (model, tmp_path / "run" / "checkpoints" / "last.ckpt"))
    for name, value in began.backbone.state_dict().items():
        torch.testing.assert_close(trained.backbone.state_dict()[name], value, msg=name)


def test_predictions_with_the_names_of_nnunet(student_run, phantom_store, tmp_path, capsys):
    command = ["predict", f"--ckpt_path={student_run}/checkpoints/last.ckpt", f"--run={tmp_path}"]
    command += [f"--data.store={phantom_store}", "--trainer.enable_progress_bar=false"]
    command += ["--part=1/2", "--trainer.callbacks+=PredictionWriter"]
    assert main([*command, "--trainer.callbacks.plain=true"]) == 0
    names = [p.name for p in (tmp_path / "predictions").iterdir()]
    cases = {path.name for path in (phantom_store / "cases").iterdir()}
    assert names and {name.removesuffix(".nii.gz") for name in names} <= cases
    entropy = ["--trainer.callbacks.plain=true", "--trainer.callbacks.entropy=true"]
    assert main([*command, *entropy]) == 1
    assert "every volume of a folder for a label map" in capsys.readouterr().err


def test_flags_beat_the_checkpoint_and_the_difference_is_printed(
    student_run, phantom_store, tmp_path, capsys
):
    checkpoint = f"--ckpt_path={student_run}/checkpoints/last.ckpt"
    flags = [
        "--model.evaluation.overlap=0.25",
        f"--run={tmp_path}",
        "--trainer.limit_test_batches=1",
    ]
    data = f"--data.store={phantom_store}"
    assert main(["test", checkpoint, data, *flags, "--trainer.enable_progress_bar=false"]) == 0
    said = capsys.readouterr().err
    assert "model.evaluation.overlap is 0.25, the checkpoint had 0.5" in said
    config = Records.read(tmp_path).sidecar.config
    assert config["evaluation"]["overlap"] == 0.25


def test_another_patch_than_in_training_is_printed(phantom_store, tmp_path, capsys):
    run = tmp_path / "run"
    flags = [f for f in TINY if "window" not in f]
    skip = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0"]
    data = f"--data.store={phantom_store}"
    command = ["fit", f"--run={run}", data, *flags, *skip, "--model=StudentModule"]
    assert main([*command, "--model.evaluation.overlap=0"]) == 0
    test = ["test", f"--ckpt_path={run}/checkpoints/last.ckpt", data, "--trainer.logger=false"]
    test += [f"--run={tmp_path}/test", "--trainer.limit_test_batches=0"]

    def said(*more):
        capsys.readouterr()
        assert main([*test, *more]) == 0
        return [line for line in capsys.readouterr().err.splitlines() if "the flags win" in line]

    wide, narrow = [32, 32, 32], [16, 16, 16]
    ending = f"{wide}, the checkpoint had {narrow} (the flags win)"
    window = f"pmixseg: the inference window is {ending}"
    assert said() == []
    assert said("--data.patch_size=32") == [f"pmixseg: data.patch_size is {ending}", window]
    flagged = said("--model.evaluation.window=[32,32,32]")
    own = f"pmixseg: model.evaluation.window is {wide}, the checkpoint had None (the flags win)"
    assert flagged == [own, window]
    # Where the window is given, the patch says nothing about it.
    fixed = said("--model.evaluation.window=[16,16,16]", "--data.patch_size=32")
    assert fixed == [
        own.replace("32, 32, 32", "16, 16, 16"),
        f"pmixseg: data.patch_size is {ending}",
    ]


def test_init_from_takes_weights_only(teacher_run, phantom_store, tmp_path):
    start = f"--init_from={teacher_run}/checkpoints/last.ckpt"
    still = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0"]
    fit(phantom_store, tmp_path / "r", "--model=TeacherModule", start, *still)
    was = load(teacher_run / "checkpoints" / "last.ckpt").state_dict()
    now = load(tmp_path / "r" / "checkpoints" / "last.ckpt").state_dict()
    for name, value in was.items():
        torch.testing.assert_close(now[name], value, rtol=0, atol=0)


def test_resumed_training_continues_its_log(teacher_run, phantom_store, tmp_path):
    flags = ["--model=TeacherModule", "--align.weight=0.1"]
    fit(phantom_store, tmp_path / "r", *flags)
    resume = f"--ckpt_path={tmp_path}/r/checkpoints/last.ckpt"
    fit(phantom_store, tmp_path / "r", *flags, "--trainer.max_epochs=2", resume)
    metrics = pd.read_csv(tmp_path / "r" / "metrics.csv")
    assert metrics["epoch"].tolist() == [0, 1]
    assert metrics["train/loss"].notna().all()


def test_resuming_with_other_terms_is_one_sentence(teacher_run, phantom_store, tmp_path, capsys):
    resume = f"--ckpt_path={teacher_run}/checkpoints/last.ckpt"
    code = main(
        [
            *["fit", f"--run={tmp_path}", f"--data.store={phantom_store}"],
            *last_of_each([*TINY, "--model=TeacherModule", resume, "--trainer.max_epochs=2"]),
        ]
    )
    assert code == 1
    assert "--init_from" in capsys.readouterr().err


def test_an_own_student_is_trained_by_name(phantom_store, tmp_path, monkeypatch):
    (tmp_path / "mine_for_test.py").write_text(
        "from pmixseg.backbones import MultiEncoderUNet\n"
        "from pmixseg.modules import StudentModule\n\n"
        "class MyStudent(StudentModule):\n"
        "    def build_backbone(self):\n"
        "        classes = self.task.num_classes\n"
        "        return MultiEncoderUNet(self.modalities, classes, width=4, levels=2)\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = [f for f in TINY if "backbone" not in f]
    assert (
        main(
            [
                *["fit", "--import", "mine_for_test", "--model=mine_for_test.MyStudent"],
                *["--run=r", f"--data.store={phantom_store}", *flags],
            ]
        )
        == 0
    )
    module = load("r/checkpoints/last.ckpt", modules=["mine_for_test"])
    assert type(module).__name__ == "MyStudent"
    assert isinstance(module, StudentModule)
    assert pmixseg.modules.load is load


@pytest.mark.parametrize(
    "files",
    [
        ("data", "teacher", "align"),
        ("data", "student"),
        ("data", "student", "distill"),
    ],
)
def test_experiment_files_compose(files, phantom_store, teacher_run, tmp_path):
    folder = Path(__file__).parents[2] / "experiments" / "brats2018"
    configs = [f"--config={folder / name}.yaml" for name in files]
    flags = [f for f in TINY if "backbone=" not in f]
    if "distill" in files:
        flags.append(f"--distill.teacher={teacher_run}/checkpoints/last.ckpt")
    whole = [*configs, f"--run={tmp_path}", f"--data.store={phantom_store}", *flags]
    extra = ["--trainer.limit_train_batches=1", "--data.num_workers=0"]
    split = ["--data.split=pmixseg.data.splits.Fractions"]
    assert main(["fit", *whole, *extra, *split, "--trainer.limit_val_batches=0"]) == 0


@pytest.mark.parametrize("command", ["test", "predict"])
def test_weights_without_what_lightning_adds_are_refused(phantom_store, tmp_path, capsys, command):
    path = save(tiny_student(), tmp_path / "bare.ckpt")
    words = [command, f"--ckpt_path={path}", f"--data.store={phantom_store}"]
    assert main([*words, "--data.split=WholeCohort"]) == 1
    assert "holds weights without what Lightning writes besides them" in capsys.readouterr().err


def test_the_configuration_is_written_as_any_jsonargparse_can(tmp_path, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "all")
    parser = TrainingParser()
    parser.add_argument("--run", type=str | None, default=None)
    trainer = SimpleNamespace(default_root_dir=tmp_path, loggers=[])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SaveRunConfig(parser, parser.parse_args([])).save_config(trainer, None, "fit")
    assert (tmp_path / "config.yaml").read_text().endswith("run: null\n")
