"""Sweep files: what W&B's own engine made of them, and that each command is an ordinary fit."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from pmixseg.cli import main
from pmixseg.modules import load
from tests.cli.presets import EXPERIMENTS, QUIET

ROOT = EXPERIMENTS.parent
FOLDER = EXPERIMENTS / "sweeps"
GOLDEN = json.loads((Path(__file__).parent / "golden" / "sweeps.json").read_text())
FILES = sorted(path.name for path in FOLDER.glob("*-*.yaml"))
TINY = [
    "--model.backbone.width=4",
    "--model.evaluation.window=[32,40,32]",
    "--model.evaluation.validation=drawn",
    "--data.patch_size=16",
    "--data.batch_size=2",
    "--data.patches_per_case=1",
    "--data.val_cases=1",
    "--trainer.max_epochs=1",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.limit_train_batches=1",
    *QUIET,
]


def command(name, run):
    """What the agent would start, by wandb's own two functions."""
    raw = yaml.safe_load((FOLDER / name).read_text())
    macros = {"args": create_sweep_command_args({"args": run})["args"]}
    words = []
    for chunk in create_sweep_command(list(raw["command"])):
        macro = re.fullmatch(r"\$\{(\w+)\}", chunk)
        words += macros[macro[1]] if macro else [chunk]
    return words


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Where the teacher of the sweeps will lie, and its checkpoint."""
    run = tmp_path_factory.mktemp("sweeps") / "teacher"
    return run, run / "checkpoints" / "last.ckpt"


@pytest.fixture(autouse=True)
def agent(monkeypatch, phantom_store, teacher):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PMIXSEG_STORE", str(phantom_store))
    monkeypatch.setenv("PMIXSEG_TEACHER", str(teacher[1]))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("PMIXSEG_RUN", raising=False)


def test_the_engine_has_seen_these_files():
    """Otherwise run tests/cli/golden/make_sweeps.py again, which also validates them."""
    assert {*FILES, "engine"} == set(GOLDEN)
    for name in FILES:
        assert yaml.safe_load((FOLDER / name).read_text()) == GOLDEN[name]["sweep"]


def test_the_engine_itself_where_it_is_installed():
    sweeps = pytest.importorskip("sweeps", reason="W&B's engine needs numpy < 2")
    from sweeps.config import SweepConfig

    for name in FILES:
        config = SweepConfig(yaml.safe_load((FOLDER / name).read_text()))
        assert sweeps.next_run(config, [], validate=True) is not None


def test_random_grid_and_bayes_with_hyperband_that_stops_the_poor():
    methods = {name: GOLDEN[name]["sweep"]["method"] for name in FILES}
    assert set(methods.values()) == {"random", "grid", "bayes"}
    assert len(GOLDEN["anchors-grid.yaml"]["runs"]) == 12
    stopped = GOLDEN["distillation-bayes.yaml"]["stopped"]
    assert "poor" in stopped
    assert "good4" not in stopped
    weights = [r["distill.weight"]["value"] for r in GOLDEN["distillation-bayes.yaml"]["runs"]]
    assert all(0.01 <= w <= 10 for w in weights)
    assert len(set(weights)) == len(weights)


def test_the_metric_has_a_stable_name():
    for name in FILES:
        assert GOLDEN[name]["sweep"]["metric"] == {"name": "val/dice", "goal": "maximize"}


@pytest.mark.parametrize("name", FILES)
def test_the_command_line_reads_every_expanded_command(name, capsys):
    runs = GOLDEN[name]["runs"]
    for run in runs[:3] + runs[-3:]:
        program, *arguments = command(name, run)
        assert program == "pmixseg"
        with pytest.raises(SystemExit) as stop:
            main([arguments[0], "--print_config", *arguments[1:]])
        assert stop.value.code == 0
        config = yaml.safe_load(capsys.readouterr().out)
        for key, value in run.items():
            if key == "align.weight":
                assert config["align"]["weight"] == value["value"]
            if key == "align.levels":
                assert config["align"]["levels"] == value["value"]
            if key == "distill.terms.logit.temperature":
                logit = config["distill"]["terms"]["logit"]
                assert logit["init_args"]["temperature"] == value["value"]
            if key == "config" and "t1ce" in value["value"]:
                anchor = config["model"]["init_args"]["anchor"]
                assert anchor["init_args"] == {"modality": "t1ce"}


def test_the_printed_loop_is_the_same_grid():
    text = (FOLDER / "README.md").read_text()
    (loop,) = re.findall(r"```bash\n(for anchor.*?)```", text, re.DOTALL)
    script = f'pmixseg() {{ printf "%s\\n" "$*"; }}\n{loop}'
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
    printed = {
        (a, float(w))
        for a, w in re.findall(r"--config=(\S+anchors\S+) --align.weight=(\S+)", done.stdout)
    }
    grid = {
        (run["config"]["value"], run["align.weight"]["value"])
        for run in GOLDEN["anchors-grid.yaml"]["runs"]
    }
    assert printed == grid
    assert done.stdout.count("--trainer.logger=true") == 12


@pytest.mark.parametrize("name", FILES)
def test_one_command_of_each_file_runs_offline(name, teacher, phantom_store, tmp_path, monkeypatch):
    import wandb

    run, checkpoint = teacher
    if not checkpoint.is_file():
        flags = ["--config=experiments/sweeps/base.yaml", "--model=TeacherModule"]
        flags += [f"--data.store={phantom_store}", "--trainer.logger=false", f"--run={run}"]
        assert main(["fit", *flags, *TINY]) == 0
    # An earlier test of this process may have made wandb read its environment for good.
    wandb.teardown()
    monkeypatch.setenv("WANDB_RUN_ID", "sweeprun1")
    _, *arguments = command(name, GOLDEN[name]["runs"][0])
    place = [f"--run={tmp_path}/run", f"--trainer.logger.save_dir={tmp_path}"]
    assert main([*arguments, *TINY, *place]) == 0

    summary = dict(wandb.run.summary)
    wandb.finish()
    for metric in ("val/dice", "val/dice/WT", "train/loss"):
        assert isinstance(summary[metric], float), metric
    assert ("train/align" in summary) == ("align.weight" in GOLDEN[name]["runs"][0])
    assert len(list(tmp_path.glob("wandb/offline-run-*-sweeprun1"))) == 1
    load(tmp_path / "run" / "checkpoints" / "last.ckpt")


@pytest.mark.slow
def test_runs_of_two_agents_have_folders_of_their_own(tmp_path, phantom_store, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = []
    for run_id in ("agent1", "agent2"):
        monkeypatch.setenv("WANDB_RUN_ID", run_id)
        monkeypatch.delenv("PMIXSEG_RUN", raising=False)
        flags = [f"--config={FOLDER / 'base.yaml'}", f"--data.store={phantom_store}"]
        assert main(["fit", *flags, "--trainer.logger=false", *TINY]) == 0
        folders += [path.name for path in (tmp_path / "runs").glob(f"*-{run_id}")]
    assert len(folders) == 2


@pytest.mark.ddp
def test_rank_0_alone_talks_to_wandb(tmp_path, phantom_store):
    """Two processes through the command line leave one run."""
    flags = [
        *["fit", "--config=experiments/sweeps/base.yaml", f"--data.store={phantom_store}"],
        *[f"--run={tmp_path}/run", f"--trainer.logger.save_dir={tmp_path}", *TINY],
        *["--align.weight=0.1", "--trainer.devices=2", "--trainer.strategy=ddp"],
        "--trainer.limit_val_batches=0",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pmixseg", *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_RUN_ID": "ddprun1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    runs = list(tmp_path.glob("wandb/offline-run-*"))
    assert [run.name.rsplit("-", 1)[1] for run in runs] == ["ddprun1"]
