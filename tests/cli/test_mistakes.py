"""Mistakes on the command line and in files: one sentence that names the place and what is near."""

import pytest
import yaml

from pmixseg.cli import main
from pmixseg.cli.mistakes import complaint
from tests.cli.test_training import TINY


def said(capsys, *args):
    code = main(list(args))
    out, err = capsys.readouterr()
    lines = [line for line in (out + err).splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("pmixseg: ")
    return code, lines[0].removeprefix("pmixseg: ")


FIT = ("fit", "--model=StudentModule", "--data.store=nowhere")


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        (
            "--trainer.max_epoch=3",
            "takes no --trainer.max_epoch; did you mean --trainer.max_epochs?",
        ),
        ("--trainer.max_ep=3", "takes no --trainer.max_ep; did you mean --trainer.max_epochs?"),
        ("--ru=x", "takes no --ru; did you mean --run?"),
        ("--weights_only=false", "--weights_only false would let a checkpoint run code"),
        ("--optimizer=Adam", "takes no --optimizer; did you mean --model.optimizer?"),
        ("--optimizer.lr=1", "takes no --optimizer.lr; did you mean --model.optimizer.lr?"),
        ("--lr_scheduler=StepLR", "takes no --lr_scheduler; did you mean --model.scheduler?"),
        ("--align.distnace=nmse", "takes no --align.distnace; did you mean --align.distance?"),
        (
            "--trainer.max_epochs=x",
            "--trainer.max_epochs is x, but must be a whole number or null.",
        ),
        ("--model.fil=zero", "--model.fil: StudentModule takes no 'fil'; did you mean fill?"),
        (
            "--model.criterion=torch.nn.CrossEntropyLoss",
            "--model.criterion is torch.nn.CrossEntropyLoss, but must be a Criterion: DiceCE",
        ),
        ("--model.fill=mean", "--model.fill is mean, but must be one of zero, anchor or null."),
        (
            "--model.backbone.width=4",
            "--model.backbone.width belongs to a class that is not named; add --model.backbone CL",
        ),
        ("--model=StudntModule", "--model: no class 'StudntModule' is known; did you mean Stud"),
        (
            "--model.optimizer=AdamX",
            "no class 'AdamX' is known; did you mean Adam",
        ),
        (
            "--model.scheduler=pmixseg.modules.OneCycl",
            "no class 'pmixseg.modules.OneCycl' is known; did you mean OneCycle?",
        ),
        (
            "--model.scheduler=pmixseg.nowhere.OneCycle",
            "--model.scheduler: no class 'pmixseg.nowhere.OneCycle' is known",
        ),
        ("--model=SegmentationModule", "have in common; use pmixseg.StudentModule or pmixseg.Te"),
        ("--model.optimizer=adamw", "no class 'adamw' is known; did you mean AdamW?"),
        ("--trainer.callbacks=EarlyStoping", "did you mean EarlyStopping?"),
        (
            "--data.patch_size=[1,2]",
            "--data.patch_size is [1, 2], but must be a whole number or a list of 3",
        ),
        ("--distill.terms.logit.temp=4", "LogitKL takes no 'temp'; did you mean temperature?"),
        ("--model.task=foo", "--model.task is foo, which is no file; name a YAML file, or its s"),
        ("--data.task=foo", "--data.task is foo, which is no file; name a YAML file, or its setti"),
        (
            "--model.evaluation.conventions=-1",
            "--model.evaluation.conventions is -1, which is no file; name a YAML file, or its set",
        ),
        (
            "--model.evaluation.conventions.hd95_empty=one",
            "--model.evaluation.conventions.hd95_empty: Conventions takes no 'hd95_empty'; it tak",
        ),
        ("extra", "'extra' is no flag; flags begin with --"),
        ("--data.store=other", "--data.store is given more than once; keep one of them."),
        ("--model.task=lost.yaml", "--model.task: the file lost.yaml does not exist; correct its"),
        ("--data.split=lost.yml", "--data.split: the file lost.yml does not exist; correct its"),
        ("--ckpt_path", "--ckpt_path needs one value; give it."),
        ("--data.seed=1:30", "--data.seed: YAML reads 1:30 as 90; write 90."),
        ("--model.optimizer.init_args.lr=1:0.5", "--model.optimizer.lr: YAML reads 1:0.5 as 60.5;"),
        ("--force=true", "--force takes no value; leave out true."),
        (
            "--model.sampler=FixedList",
            "--model.sampler: FixedList needs combinations; give it, as by --model.sampler.comb",
        ),
        ("--config={data: 3}", "--config: data is 3, but must hold settings; write them below it"),
    ],
)
def test_a_wrong_flag_is_a_sentence(capsys, flag, sentence):
    start = [word for word in FIT if not flag.startswith("--model=") or "model" not in word]
    code, text = said(capsys, *start, flag)
    assert code == 2
    assert sentence in text
    assert "usage" not in text
    assert "<class" not in text


@pytest.mark.parametrize(
    "form",
    [
        "--data.task={}",
        "--model.task {}",
        "data: {{task: {}}}",
        "model: {{class_path: StudentModule, init_args: {{task: {}}}}}",
    ],
)
def test_the_file_of_a_task_imports_nothing(tmp_path, capsys, monkeypatch, form):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "odd_task.py").write_text("raise SystemExit('imported by accident')\n")
    (tmp_path / "odd_task.yaml").write_text("modalities: [t1\n")
    (tmp_path / "a.yaml").write_text(form.format("odd_task.yaml"))
    monkeypatch.chdir(tmp_path)
    words = form.format("odd_task.yaml").split() if form.startswith("--") else ["-c", "a.yaml"]
    code, text = said(capsys, "fit", *words)
    assert code == 1
    assert text.startswith("odd_task.yaml is not a task (")


@pytest.mark.parametrize("folder", [".", "settings"])
@pytest.mark.parametrize("form", ["flags", "file"])
def test_files_named_by_settings_are_read(tmp_path, capsys, monkeypatch, folder, form):
    """They lie in the working folder, or beside the file that names them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings").mkdir()
    task = "name: two\nmodalities: [a, b]\nlabels: [x]\nregions: {all: [x]}\n"
    (tmp_path / folder / "two.yaml").write_text(task)
    (tmp_path / folder / "part.yaml").write_text("{train: 0.5, val: 0.25, test: 0.25}\n")
    (tmp_path / "settings" / "a.yaml").write_text("data: {task: two.yaml, split: part.yaml}\n")
    words = ["-c", "settings/a.yaml"]
    if form == "flags":
        words = [f"--data.task={folder}/two.yaml", f"--data.split={folder}/part.yaml"]
    with pytest.raises(SystemExit):
        main(["fit", "--print_config", *words])
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    assert data["task"]["modalities"] == ["a", "b"]
    assert data["split"]["class_path"] == "pmixseg.data.Fractions"
    assert data["split"]["init_args"]["train"] == 0.5


def test_a_wrong_flag_of_a_nested_class(capsys):
    _, text = said(capsys, *FIT, "--model.backbone=MultiEncoderUNet", "--model.backbone.widht=4")
    assert text == "--model.backbone.widht: MultiEncoderUNet takes no 'widht'; did you mean width?"
    _, text = said(capsys, *FIT, "--model.backbone=MultiEncoderUNet", "--model.backbone.width=x")
    assert text == "--model.backbone.width is x, but must be a whole number."


BOMB = "a: &a [1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{chr(ord(name) - 1)}'] * 9)}]\n" for name in "bcdefghij"
)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("model: {class_path: A\ntrainer: [1\n", "line 2: this is no YAML"),
        (
            "data: {task: lost.yaml}\n",
            "line 1: the file lost.yaml does not exist; correct",
        ),
        ("data:\n  split: lost.json\n", "line 2: the file lost.json does not exist; correct its"),
        (
            "trainer: {max_epochs: 1}\ndata:\n  stroe: st\n",
            "line 3: data.stroe is no setting; did you mean data.store?",
        ),
        (
            "trainer:\n  max_epochs: x\n",
            "line 2: trainer.max_epochs is x, but must be a whole number or",
        ),
        (
            "model:\n  class_path: StudentModule\n  init_args:\n    backbone:\n"
            "      class_path: MultiEncoderUNet\n      init_args: {widht: 4}\n",
            "line 6: MultiEncoderUNet takes no 'widht'; did you mean width?",
        ),
        ("- a\n- b\n", "holds no settings, but a list"),
        ("nonsense\n", "holds no settings, but a str"),
        ("data:\n  seed: 1\n  seed: 2\n", "line 3: the key 'seed' stands twice; keep one of them."),
        ("\ntrainer: &x {b: *x}\n", "line 2: an alias stands inside what it repeats; remove it."),
        ("a: " + "[" * 3000 + "]" * 3000, "is nested too deeply to be read; correct it."),
        ("a: 2020-13-45\n", "cannot be read (month must be in 1..12); correct it."),
        (BOMB, "its aliases repeat more than 100000 values; write them out."),
        ("trainer: [max_epochs, 1]\n", "trainer is ['max_epochs', 1], but must hold settings"),
        ("trainer:\ndata: {store: x}\n", "trainer is None, but must hold settings"),
        ("data:\n  patch_size:\n", "line 2: data.patch_size is null, but needs a value; give one."),
        (
            "model:\n  class_path: StudentModule\n  init_args:\n    optimizer:\n"
            "      class_path: torch.optim.AdamW\n      init_args: {lr: null}\n",
            "line 6: model.optimizer.lr is null, but needs a value; give one.",
        ),
        (
            "model:\n  class_path: StudentModule\n  init_args:\n    optimizer:\n"
            "      class_path: torch.optm.AdamW\n      init_args: {lr: 1}\n",
            "line 5: no class 'torch.optm.AdamW' is known; correct it.",
        ),
        (
            "model:\n  class_path: pmixseg.StudntModule\n",
            "line 2: no class 'pmixseg.StudntModule' is known; did you mean StudentModule?",
        ),
        (
            "model:\n  class_path: StudentModule\n  init_args:\n    optimizer:\n"
            "      class_path: torch.optim.AdamW\n      init_args: {lrr: 1}\n",
            "line 6: AdamW takes no 'lrr'; did you mean lr?",
        ),
        (
            "model:\n  class_path: pmixseg.StudentModule\n  init_args:\n    backbon:\n"
            "      class_path: MultiEncoderUNet\n      init_args: {width: 4}\n",
            "line 4: StudentModule takes no 'backbon'; did you mean backbone?",
        ),
        (
            "model:\n  class_path: StudentModule\n  init_args:\n    backbone:\n"
            "      class_path: MultiEncoderUNet\n      width: 4\n",
            "line 6: 'width' is no key here; put the arguments of a class below init_args.",
        ),
        (
            "model:\n  class_path: StudentModule\n  init_args:\n    optimizer:\n"
            "      clas_path: torch.optim.AdamW\n      init_args: {lr: 1}\n",
            "line 5: 'clas_path' is no key here; did you mean class_path?",
        ),
        ("data: {split: {trian: a.txt}}\n", "no split of data.split takes trian"),
        ("align: 5\ndata: {store: x}\n", "align is 5, but must hold settings; write them below"),
        ("distill:\ndata: {store: x}\n", "distill is None, but must hold settings; write them"),
        ("data: {task: 5}\n", "data.task is 5, but must hold settings; write them below it"),
        (
            "model:\n  class_path: StudentModule\n  init_args:\n"
            "    evaluation: {conventions: [1]}\n",
            "model.evaluation.conventions is [1], but must hold settings; write them below it",
        ),
        (
            "model:\n  class_path: StudentModule\n  init_args:\n    evaluation:\n"
            "      conventions: {hd95_empty: one}\n",
            "line 5: Conventions takes no 'hd95_empty'; it takes hd95, percentile, nsd",
        ),
        ("data:\n  task: {modality: [a]}\n", "line 2: Task takes no 'modality'; did you mean mod"),
        ("data:\n  split: 5\n", "line 2: data.split is 5, but must be a SplitPlan or null."),
        (
            "data:\n  masks: {x: 1}\n",
            "line 2: data.masks is {'x': 1}, but must be a CaseMasks, by its class_path or null.",
        ),
        (
            "distill:\n  terms: a\n",
            "line 2: distill.terms is a, but must be a mapping in braces or null.",
        ),
        ("data:\n  seed: 010\n", "line 2: YAML reads 010 as 8; write 8, or '010' for text."),
        ("data: {batch_size: 1:30}\n", "line 1: YAML reads 1:30 as 90; write 90, or '1:30'"),
        ("trainer:\n  callbacks: {x: 1}\n", "Callback takes no 'x'; it takes no arguments."),
    ],
)
def test_a_wrong_file_is_a_sentence(tmp_path, capsys, content, sentence):
    path = tmp_path / "a.yaml"
    path.write_text(content)
    code, text = said(capsys, "fit", "-c", str(path))
    assert code in (1, 2)
    assert sentence in text
    if "split" not in sentence:
        assert text.startswith(str(path))


@pytest.mark.parametrize("content", ["a: 2020-13-45", "a: 0x_", "a: 2020-01-01T00:00:00+99:00"])
@pytest.mark.parametrize(
    ("args", "said_of"),
    [
        (("fit", "--data"), "cannot be read"),
        (("fit", "--model.task"), "is not a task"),
        (("prepare", ".", "store", "--layout"), "cannot be read"),
        (("phantom", "cohort", "--contrasts"), "does not hold contrasts"),
    ],
)
def test_values_that_yaml_cannot_make_are_one_sentence(
    tmp_path, capsys, monkeypatch, content, args, said_of
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(content)
    code, text = said(capsys, *args, "a.yaml")
    assert code in (1, 2)
    # A date is text to jsonargparse, which reads the settings of a group.
    assert (said_of if "_" in content or args[1] != "--data" else "data.a is no setting") in text


def test_a_file_that_is_missing(capsys):
    code, text = said(capsys, "fit", "-c", "nowhere.yaml")
    assert (code, "nowhere.yaml does not exist" in text) == (2, True)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["tets"], "'tets' is no command; did you mean test?"),
        (["prepare"], "pmixseg prepare needs root, store; see `pmixseg prepare --help`."),
        (["inspect", "--laout", "x", "base"], "inspect takes no --laout; did you mean --layout?"),
        (["inspect", "--lay", "x", "base"], "inspect takes no --lay; did you mean --layout?"),
        (
            ["compare", "--a", "x", "--a", "y", "--b", "z"],
            "pmixseg compare: --a is given more than once; see `pmixseg compare --help`.",
        ),
        (["phantom", "x", "--cases", "many"], "argument --cases: invalid int value: 'many'"),
        (["fit", "--config=."], "--config: the path is not a file: '"),
    ],
)
def test_a_wrong_plain_command_is_a_sentence(capsys, args, sentence):
    code, text = said(capsys, *args)
    assert code == 2
    assert sentence in text


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--trainer.accelerator=gpu"], "Lightning refuses: "),
        (["--trainer.barebones=true", "--trainer.profiler=simple"], "Lightning refuses: "),
        (["--trainer.val_check_interval=100"], "Lightning refuses: `val_check_interval` (100)"),
        (["--model.optimizer=SGD", "--model.optimizer.lr=-1"], "Invalid learning rate"),
        (
            ["--model.scheduler=StepLR", "--model.scheduler.step_size=0"],
            "StepLR cannot be used (integer modulo by zero); correct its arguments.",
        ),
        (["--trainer.logger=MLFlowLogger"], "Jsonargparse refuses: Requirement 'mlflow"),
        (
            ["--model.scheduler=torch.optim.lr_scheduler.ChainedScheduler"],
            "ChainedScheduler cannot be made (object of type 'AdamW' has no len()); correct its",
        ),
        (["--align.levels=[9]"], "levels [9] are not different levels of a network with 2"),
        (["--data.val_cases=-1"], "val_cases is -1; give 1 or more"),
        (
            [
                *("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/dice"),
                *("--trainer.callbacks.mode=max", "--trainer.callbacks.patience=-1"),
            ],
            "EarlyStopping has patience -1; give 0 or more.",
        ),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"],
            "watches val_loss, which this training does not log",
        ),
    ],
)
def test_a_complaint_of_lightning_is_a_sentence(phantom_store, tmp_path, capsys, flags, sentence):
    command = ["fit", f"--run={tmp_path}", f"--data.store={phantom_store}", *TINY]
    if "gpu" in flags[0]:
        command.remove("--trainer.accelerator=cpu")
    if "val_cases" in flags[0]:
        command.remove("--data.val_cases=1")
    code = main([*command, "--trainer.limit_train_batches=2", *flags])
    last = capsys.readouterr().err.splitlines()[-1]
    assert code == 1
    assert last.startswith("pmixseg: ")
    assert sentence in last


def test_a_rank_that_is_no_number(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "first")
    code, text = said(capsys, *FIT)
    assert (code, text) == (
        1,
        "the environment variable LOCAL_RANK is 'first', but must be 0 or more; correct or unset "
        "it.",
    )


def test_preprocessing_writes_nothing_among_the_scans_it_reads(tmp_path, capsys):
    for out in (tmp_path, tmp_path / "out"):
        code, text = said(capsys, "preprocess", str(tmp_path), str(out))
        assert code == 1
        assert "is searched for scans, so results would be taken for scans" in text


def test_a_wrong_distance_is_found_where_its_weight_is_0(capsys):
    code, text = said(capsys, *FIT, "--align.distance=nmsee")
    assert code == 1
    assert "align.distance: there is no distance 'nmsee'; use one of" in text


def test_a_file_of_one_group_that_is_no_utf8(tmp_path, capsys):
    (tmp_path / "a.yaml").write_bytes(b"distance: n\xe4se")
    assert main(["fit", "--align", str(tmp_path / "a.yaml")]) == 1
    assert f"{tmp_path / 'a.yaml'} is no text in UTF-8" in capsys.readouterr().err


def test_an_error_that_only_passes_through_a_library_is_no_complaint():
    try:
        {}["a"]
    except KeyError as error:
        assert complaint(error) is None


def test_a_wrong_setting_of_wandb_is_a_sentence():
    wandb = pytest.importorskip("wandb")
    with pytest.raises(ValueError) as refused:
        wandb.Settings(mode="odd")
    said = str(complaint(refused.value))
    assert said.startswith("Wandb refuses: mode: Input should be 'online', 'offline'")
    assert said.endswith("; correct it, or its WANDB_ variable.") and "[type" not in said
