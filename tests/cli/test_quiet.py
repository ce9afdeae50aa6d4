"""What a whole training and its test print, in a process of their own: our lines, and tables."""

import re
import subprocess
import sys

SCRIPT = """
import sys
from pmixseg.cli import main
store, run, *small = sys.argv[1:]
made = main(["fit", f"--run={run}", f"--data.store={store}", *small])
path = f"--ckpt_path={run}/checkpoints/last.ckpt"
sys.exit(made or main(["test", path, "--trainer.enable_progress_bar=false"]))
"""

SMALL = [
    *("--model.backbone=MultiEncoderUNet", "--model.backbone.width=2", "--model.backbone.levels=2"),
    *("--model.scheduler=OneCycle", "--model.evaluation.window=[32,32,32]"),
    *(
        "--data.patch_size=16",
        "--data.num_workers=0",
        "--data.val_cases=1",
        "--data.split=Fractions",
    ),
    *("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.accelerator=cpu"),
    "--trainer.limit_test_batches=1",
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
]

OURS = re.compile(
    r"(INFO: )?Split: |\s*(Dice|FLAIR|[─●○]|mean )|\d+ cases?; .*records\.csv, conventions in|"
    r"[┏┡└┃│]|\s*$"
)


def test_a_whole_training_and_its_test_print_our_lines_alone(phantom_store, tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(phantom_store), str(tmp_path / "run"), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (done.stdout + done.stderr).splitlines()
    assert [line for line in lines if not OURS.match(line)] == []
    assert any("Split: " in line for line in lines)
