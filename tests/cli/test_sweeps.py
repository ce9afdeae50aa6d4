"""Sweep files: what W&B's own engine made of them, and that each command is an ordinary fit."""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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


def train_teacher(teacher, store):
    run, checkpoint = teacher
    if not checkpoint.is_file():
        flags = ["--config=experiments/sweeps/base.yaml", "--model=TeacherModule"]
        flags += [f"--data.store={store}", "--trainer.logger=false", f"--run={run}"]
        assert main(["fit", *flags, *TINY]) == 0


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


def test_a_value_of_a_sweep_may_be_null(capsys):
    """Python writes it as None, and so does wandb, also within a mapping of nested parameters."""
    values = {"model.anchor": None, "model.fill_levels": None, "run": None}
    values |= {"data": {"masks": None, "seed": 5}, "align": {"levels": [-1], "anchor": None}}
    _, *words = command("anchors-grid.yaml", {k: {"value": v} for k, v in values.items()})
    assert "--run=None" in words
    with pytest.raises(SystemExit):
        main([words[0], "--print_config", *words[1:]])
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["data"]["masks"], config["data"]["seed"], config["run"]) == (None, 5, None)
    assert (config["align"]["levels"], config["align"]["anchor"]) == ([-1], None)
    assert config["model"]["init_args"]["anchor"] is None


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

    train_teacher(teacher, phantom_store)
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


class StandIn(BaseHTTPRequestHandler):
    """Answer what wandb's command asks of its server, for one sweep of one run."""

    def do_POST(self):  # named by http.server
        if self.path != "/graphql":  # such as statistics of use
            self.send_error(404)
            return
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        data = json.dumps({"data": self.server.answer(query["query"], query.get("variables"))})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data.encode())

    def log_message(self, *args):
        pass


class StandInServer(ThreadingHTTPServer):
    """Keep the sweep's settings, and hand out one run of it."""

    def __init__(self, run):
        super().__init__(("127.0.0.1", 0), StandIn)
        self.settings = None
        self.commands = [[{"type": "run", "run_id": "sweeprun1", "program": None, "args": run}]]

    def answer(self, query, variables):
        project = {"id": "p", "name": "pmixseg", "entity": {"id": "e", "name": "ENTITY"}}
        if "upsertSweep" in query:
            self.settings = variables["config"]
            made = {"sweep": {"name": "ID", "project": project}, "configValidationWarnings": []}
            return {"upsertSweep": made}
        if "SweepWithRuns" in query:
            sweep = {"id": "s", "name": "ID", "config": self.settings, "runs": {"edges": []}}
            return {"project": {"sweep": sweep}}
        if "createAgent" in query:
            return {"createAgent": {"agent": {"id": "a"}}}
        if "agentHeartbeat" in query:
            # An agent goes on until its server ends it; a run in progress is left to end.
            busy = "true" in json.dumps(variables).lower()
            commands = [] if busy else self.commands.pop() if self.commands else [{"type": "exit"}]
            return {"agentHeartbeat": {"agent": {"id": "a"}, "commands": json.dumps(commands)}}
        user = {"id": "u", "username": "ENTITY", "entity": "ENTITY", "teams": {"edges": []}}
        return {"viewer": {**user, "flags": "{}", "admin": False, "apiKeys": {"edges": []}}}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FILES)
def test_the_two_lines_of_wandb_run_as_written(name, tmp_path, phantom_store, teacher):
    """A server on this machine takes the place of W&B's; command and agent are wandb's own."""
    train_teacher(teacher, phantom_store)
    pages = [FOLDER / "README.md", ROOT / "docs" / "tutorials" / "sweep.md"]
    shown = {tuple(re.findall(r"^wandb [^#\n]*[^#\s]", page.read_text(), re.M)) for page in pages}
    ((sweep, agent),) = shown  # both pages show the same two lines
    program = tmp_path / "bin" / "pmixseg"
    program.parent.mkdir()
    flags = shlex.join([*TINY, f"--run={tmp_path}/run", f"--trainer.logger.save_dir={tmp_path}"])
    program.write_text(
        f'#!/bin/sh\nWANDB_MODE=offline exec {sys.executable} -m pmixseg "$@" {flags}\n'
    )
    program.chmod(0o755)

    run = GOLDEN[name]["runs"][-1]
    with StandInServer(run) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        env = {**os.environ, "WANDB_BASE_URL": place, "WANDB_API_KEY": "0" * 40}
        env |= dict.fromkeys(("WANDB_DIR", "WANDB_CONFIG_DIR", "HOME"), str(tmp_path))
        env |= {"WANDB_MODE": "online", "WANDB_SILENT": "false"}
        programs = [str(program.parent), str(Path(sys.executable).parent), env["PATH"]]
        env["PATH"] = os.pathsep.join(programs)
        lines = f"{sweep.replace('anchors-grid.yaml', name)}\n{agent}\n"
        done = subprocess.run(
            ["bash", "-euc", lines], cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr[-3000:]
    assert yaml.safe_load(server.settings) == GOLDEN[name]["sweep"]
    assert "wandb agent ENTITY/pmixseg/ID" in done.stderr
    assert len(list(tmp_path.glob("wandb/offline-run-*-sweeprun1"))) == 1
    made = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    for group in ("align", "distill"):
        if f"{group}.weight" in run:
            assert made[group]["weight"] == run[f"{group}.weight"]["value"]
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
