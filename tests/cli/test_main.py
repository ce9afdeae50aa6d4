"""The command line itself: help, wrong input, --import, what is printed, and how it is stopped."""

import io
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

import pmixseg
from pmixseg.cli import import_modules, main, print_anything
from pmixseg.cli.arguments import option
from pmixseg.cli.checkpoint_settings import (
    with_checkpoint_defaults,
    with_evaluation,
)
from pmixseg.errors import warn_in_one_line
from pmixseg.interrupt import stopping_code
from pmixseg.modules.training.resuming import differences
from tests.cli.presets import QUIET, TINY_UNET
from tests.cli.test_training import TINY


def test_a_stream_of_the_c_locale_shows_what_it_can(monkeypatch):
    for encoding, errors, shown in (
        ("ascii", "surrogateescape", b"5?5"),
        ("ascii", "strict", b"5?5"),
        ("utf-8", "surrogateescape", "5×5".encode()),
    ):
        raw = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding, errors))
        print_anything()
        print("5×5", end="", flush=True)  # noqa: T201  # what is tested
        assert raw.getvalue() == shown


def test_a_working_folder_that_was_removed(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["inspect", "base"]) == 1
    said = capsys.readouterr().err
    assert said == (
        "pmixseg: the working folder is gone (No such file or directory); change to another one.\n"
    )


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for command in ("quickstart", "phantom", "inspect", "prepare", "fit", "test", "report"):
        assert command in text


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"pmixseg {pmixseg.__version__}\n"


def test_bad_input_is_one_sentence_and_exit_code_one(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("pmixseg: ")
    assert "nowhere" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "command",
    [
        "inspect {root} --task {file}",
        "inspect {root} --layout {file}",
        "prepare {root} {root}/store --task {file}",
        "phantom {root}/made --cases 1 --task {file}",
        "phantom {root}/made --cases 1 --contrasts {file}",
        "fit -c {file}",
        "fit --data.store={root} --data.task={file}",
        "report {root}/records.csv",
        "compare --a {root}/records.csv --b {root}/records.csv",
    ],
)
def test_a_file_that_is_no_text_is_one_sentence(tmp_path, capsys, command):
    for name in ("bin.yaml", "records.csv", "records.json"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x80\x81 \x00")
    words = command.format(root=tmp_path, file=tmp_path / "bin.yaml").split()
    assert main(words) == (2 if "-c" in words else 1)  # 2: the call itself is wrong
    said = capsys.readouterr().err
    assert said.startswith("pmixseg: ")
    assert "bin.yaml" in said or "records" in said
    assert "Traceback" not in said


def test_a_task_is_utf_8_wherever_it_is_read(tmp_path):
    text = "name: größe\nmodalities: [t1]\nlabels: [ödem]\nregions: {all: [ödem]}\n"
    (tmp_path / "task.yaml").write_text(text, encoding="utf-8")
    code = (
        "from pathlib import Path; from pmixseg.cli.commands import read_task; "
        "assert read_task(Path('task.yaml')).name == 'gr\\u00f6\\u00dfe'"
    )
    plain = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=plain, check=True)


def test_missing_checkpoint_is_one_sentence(tmp_path, capsys):
    assert main(["test", "--ckpt_path", str(tmp_path / "none.ckpt")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_a_file_that_is_no_checkpoint_is_one_sentence(tmp_path, capsys):
    (tmp_path / "text.ckpt").write_text("hello")
    assert main(["test", "--ckpt_path", str(tmp_path / "text.ckpt")]) == 1
    assert "cannot be read as a checkpoint" in capsys.readouterr().err


def test_import_loads_modules_of_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my_networks_for_test.py").write_text("x = 1\n")
    monkeypatch.chdir(tmp_path)
    left, names = import_modules(["fit", "--import", "my_networks_for_test", "--x=1"])
    assert (left, names) == (["fit", "--x=1"], ["my_networks_for_test"])
    assert sys.modules["my_networks_for_test"].x == 1


def test_import_of_nothing_is_one_sentence(capsys):
    assert main(["fit", "--import", "no_such_module_here"]) == 1
    assert "--import no_such_module_here" in capsys.readouterr().err


def test_options_are_found_in_both_notations():
    assert option(["--a", "1", "--b=2", "--a=3"], "--a") == "3"
    assert option(["--b=2"], "--a") is None
    assert with_checkpoint_defaults(["fit", "--ckpt_path", "x"]) == ["fit", "--ckpt_path", "x"]


def test_differences_are_named_by_their_path():
    stored = {"a": 1, "b": {"class_path": "X", "init_args": {"w": 8}}, "task": 1}
    current = {"a": 1, "b": {"class_path": "X", "init_args": {"w": 4}}, "c": 2, "task": 2}
    weights = "model.b.init_args.w is 4, the checkpoint had 8"
    other = {**current, "b": {"class_path": "Y", "init_args": {"v": 1}}}
    told = partial(differences, where="model")
    assert told(stored, other) == ["model.b is Y, the checkpoint had X"]
    # What the checkpoint does not state has its default, unless a flag names it.
    assert told(stored, current) == [weights]
    named = ["test", "--model.init_args.c=2"]
    assert told(stored, current, named) == [weights, "model.c is 2, the checkpoint had None"]


def test_another_class_of_module_is_a_difference():
    student, teacher = (
        with_evaluation({"class_path": f"pmixseg.{name}", "init_args": {}})
        for name in ("StudentModule", "TeacherModule")
    )
    told = "model.class is TeacherModule, the checkpoint had StudentModule"
    assert differences(student, teacher, where="model") == [told]
    assert differences(student, student) == []


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_output_that_is_not_utf_8_loses_signs_and_nothing_else(phantom_root, encoding, monkeypatch):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["inspect", str(phantom_root)]) == 0
    out.flush()
    assert "Brats18_PHANTOM_000_1" in out.buffer.getvalue().decode(encoding)
    assert (out.errors, err.errors) == ("replace", "replace")


def test_a_process_writes_what_its_pipe_can_hold(phantom_root):
    plain = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "pmixseg", "inspect", str(phantom_root)]
    done = subprocess.run(command, env=plain, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Brats18_PHANTOM_000_1" in done.stdout.decode("ascii")


def test_a_warning_of_the_package_is_its_sentence_alone(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    own, foreign = pmixseg.cli.__file__, torch.__file__
    before = warnings.formatwarning("odd", UserWarning, foreign, 3)
    warn_in_one_line()
    assert warnings.formatwarning(UserWarning("odd"), UserWarning, own, 3) == "pmixseg: odd\n"
    assert warnings.formatwarning("odd", UserWarning, foreign, 3) == before != "pmixseg: odd\n"


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_a_checkpoint_is_needed(command, phantom_store, capsys):
    """Without one, weights drawn at random were scored."""
    assert main([command, f"--data.store={phantom_store}"]) == 2
    assert f"{command} needs --ckpt_path" in capsys.readouterr().err


def test_a_word_for_a_number_is_no_class(phantom_store, capsys):
    words = ["fit", f"--data.store={phantom_store}", "--model.optimizer.lr=fast"]
    assert main(words) == 2
    assert "--model.optimizer.lr is fast, but must be a number." in capsys.readouterr().err


def test_what_a_library_says_in_lines_is_one_line(tmp_path, capsys):
    rows = "run,case,combination,region,dice\nr,1,t1,WT,1\nr,1,t1,WT,1,2,3\n"
    (tmp_path / "records.csv").write_text(rows)
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "r.html")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be read as a table" in line and line.endswith("test again.")


SCRIPT = """
import sys
from pmixseg.cli import main
store, run, *small = sys.argv[1:]
made = main(["fit", f"--run={run}", f"--data.store={store}", *small])
path = f"--ckpt_path={run}/checkpoints/last.ckpt"
sys.exit(made or main(["test", path, "--trainer.enable_progress_bar=false"]))
"""

SMALL = [
    *(*QUIET, *TINY_UNET, "--model.scheduler=OneCycle", "--model.evaluation.window=[32,40,32]"),
    *("--data.patch_size=16", "--data.num_workers=0", "--data.val_cases=1"),
    *("--data.split=Fractions", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"),
    "--trainer.limit_test_batches=1",
]

OURS = re.compile(
    r"(INFO: )?(Split|Network|Checkpoints): |\s*(Dice|FLAIR|[─●○]|mean )|"
    r"\d+ cases?; .*records\.csv, conventions in|[┏┡└┃│]|\s*$"
)


def test_a_whole_training_and_its_test_print_our_lines_alone(phantom_store, tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(phantom_store), str(tmp_path / "run"), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (done.stdout + done.stderr).splitlines()
    assert [line for line in lines if not OURS.match(line)] == []
    weights = pmixseg.load(tmp_path / "run" / "checkpoints" / "last.ckpt").parameters()
    size = sum(w.numel() for w in weights)
    assert any(f"Network: MultiEncoderUNet, {size:,} parameters" in line for line in lines)
    written = "Checkpoints: run/checkpoints/best.ckpt, run/checkpoints/last.ckpt"
    assert any(written in line for line in lines)


def test_a_training_that_sigterm_stops_does_not_end_as_if_it_were_done(
    phantom_store, tmp_path, capsys, caplog, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "ends_itself.py").write_text(
        "import os, signal\nfrom lightning.pytorch import Callback\n\n"
        "class End(Callback):\n    def on_train_batch_start(self, *args):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    command = ["fit", f"--run={tmp_path}", f"--data.store={phantom_store}", *TINY]
    # The campaign of this process may have a handler of its own, which Lightning would call, too.
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert main([*command, "--trainer.callbacks=ends_itself.End"]) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == "pmixseg: stopped." and "SIGTERM" not in said + caplog.text


def test_ctrl_c_is_seen_through_what_libraries_make_of_it():
    def nested():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1) from None

    with pytest.raises(SystemExit) as stop:
        nested()
    assert stopping_code(stop.value) == 130
    assert stopping_code(SystemExit(2)) is None


@pytest.mark.parametrize("after", [0.6, 1.2, None])
def test_ctrl_c_ends_a_training_with_130_and_one_line(phantom_store, tmp_path, after):
    flags = [f for f in TINY if "max_epochs" not in f]
    command = [sys.executable, "-m", "pmixseg", "fit", f"--run={tmp_path}"]
    command += [f"--data.store={phantom_store}", *flags, "--data.num_workers=1"]
    command += ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0"]
    child = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    if after is None:  # in the midst of a training
        limit = time.monotonic() + 120
        while not (tmp_path / "checkpoints" / "last.ckpt").is_file():
            assert time.monotonic() < limit, child.poll()
            time.sleep(0.1)
    else:
        time.sleep(after)
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=60)
    if after is None or err:  # before that Python itself may still be starting
        assert child.returncode == 130, err
        assert err.splitlines()[-1] == "pmixseg: stopped."
        assert "Traceback" not in out + err
    with pytest.raises(ProcessLookupError):  # nobody of its group is left; init collects orphans
        for _ in range(100):
            os.killpg(child.pid, 0)
            time.sleep(0.1)


def run_with(module, folder, *words):
    """A command in a process of its own, which imports a module of this text; and its children."""
    (folder / "mine.py").write_text(module)
    command = [sys.executable, "-m", "pmixseg", *words, "--import=mine"]
    environment = {**os.environ, "PYTHONPATH": str(Path(pmixseg.__file__).parents[1])}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_in_the_midst_of_a_command(tmp_path, number, code):
    """The case in hand is cleared up, wherever the library's code has been interrupted."""
    child = run_with(
        "import os, signal\nfrom pathlib import Path\n\n"
        "def replace(self, target):\n"
        f"    os.kill(os.getpid(), signal.{number})\n    raise OSError('never seen')\n\n"
        "Path.replace = Path.rename = replace\n",
        tmp_path,
        *("phantom", "here", "--workers=0", "--cases=1", "--spacing=6"),
    )
    assert (child.returncode, child.stderr) == (code, "pmixseg: stopped.\n")
    assert not [*(tmp_path / "here").glob(".*")]


@pytest.mark.parametrize(
    "module",
    [
        "import os, signal\n"  # swallowed by a library
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n",
        "import signal\nfrom pmixseg.interrupt import raise_on_interrupt\n"  # Python's own mark
        "raise_on_interrupt()\nexec('signal.raise_signal(signal.SIGINT)')\n",
        "import signal\nfrom pmixseg.interrupt import raise_on_interrupt\n"  # late, and swallowed
        "raise_on_interrupt()\n"
        "try:\n    signal.raise_signal(signal.SIGINT)\nexcept BaseException:\n    pass\n",
    ],
)
def test_ctrl_c_in_an_import_is_130_and_no_signal(tmp_path, module):
    child = run_with(module, tmp_path, "phantom", "here")
    assert (child.returncode, child.stderr) == (130, "pmixseg: stopped.\n")
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["phantom", ""], "argument 2"),
        (["segment", "model.ckpt", "case", "-o", ""], "-o"),
        (["report", "", "runs/b"], "argument 2"),
        (["fit", "--run=", "--data.store=store"], "--run"),
        (["fit", "--data.store="], "--data.store"),
    ],
)
def test_an_unset_shell_variable_is_not_the_working_folder(
    words, name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"pmixseg: {name} is empty")
    assert not list(tmp_path.iterdir())


INTERRUPT = "signal.raise_signal(signal.SIGINT)"


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (INTERRUPT, 130),
        (f"exit_on_interrupt(); {INTERRUPT}", 130),
        (INTERRUPT.replace("INT", "TERM"), 143),
        ("sys.exit(0)", 0),
    ],
)
def test_the_server_of_a_quickstart_ends_with_it(tmp_path, end, code):
    """Else it imports on for seconds; here for minutes."""
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(120)\n")
    child = run_with(
        "import signal, sys, tempfile\nfrom pmixseg.cli import commands\n"
        "from pmixseg.interrupt import exit_on_interrupt\n"
        "start, tempfile.tempdir = commands.start_server, '.'\n\n"
        f"def first(modules):\n    start(['slow'])\n    {end}\n\n"
        "commands.start_server = first\n",
        tmp_path,
        "quickstart",
    )
    assert (child.returncode, child.stderr) == (code, "pmixseg: stopped.\n" if code else "")
    assert not [*tmp_path.glob("pymp-*")]
