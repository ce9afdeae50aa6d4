"""Tasks of one to six sequences with labels of their own, from files to report, by YAML alone."""

import pandas as pd
import pytest

from pmixseg.cli import main
from pmixseg.cli.commands import read_task
from pmixseg.data.phantom.task import label_codes
from pmixseg.data.store.store import Store
from pmixseg.errors import InputError
from pmixseg.task import BRATS
from tests.cli.presets import EXPERIMENTS
from tests.evaluation.made_up import figures_left_empty

TASKS = EXPERIMENTS / "other_tasks"
BRATS_LABELS = """labels: [NCR, ED, ET]
regions: {WT: [NCR, ED, ET], TC: [NCR, ET], ET: [ET]}
"""
WRITTEN = {
    "one": f"name: one\nmodalities: [flair]\n{BRATS_LABELS}",
    "three": """name: three
modalities: [flair, t1ce, t2]
labels: [oedema]
regions: {oedema: [oedema]}
""",
    "five": f"name: five\nmodalities: [flair, t1ce, t1, t2, pd]\n{BRATS_LABELS}",
}
"""Tasks beside those of the folder."""
LABELS = {
    "one": [],
    "two": ["--labels", "core=NCR,oedema=ED"],
    "three": ["--labels", "oedema=ED"],
    "five": [],
    "six": ["--labels", "core=NCR", "oedema=ED", "enhancing=ET"],
}
TINY = [
    "--model.backbone.width=4",
    "--model.backbone.levels=2",
    "--model.evaluation.window=[32,40,32]",
    "--model.evaluation.batch_size=2",
    "--data.patch_size=16",
    "--data.patches_per_case=1",
    "--trainer.max_epochs=1",
    "--trainer.accelerator=cpu",
]
SPLIT = [
    "--data.split=pmixseg.data.splits.Fractions",
    "--data.split.train=0.5",
    "--data.split.val=0.25",
    "--data.split.test=0.25",
    "--trainer.enable_progress_bar=false",
]


SLOW = ("three", "five")


@pytest.mark.parametrize(
    "name", [n if n not in SLOW else pytest.param(n, marks=pytest.mark.slow) for n in LABELS]
)
def test_any_task_goes_the_whole_path(name, tmp_path, capsys):
    file, cohort, store = TASKS / f"{name}.yaml", tmp_path / "cohort", tmp_path / "store"
    if name in WRITTEN:
        file = tmp_path / f"{name}.yaml"
        file.write_text(WRITTEN[name])
    task, run = read_task(file), tmp_path / name
    flags = ["--task", str(file)]
    made = ["phantom", str(cohort), "--cases", "4", "--spacing", "6", "--workers", "0"]
    assert main([*made, *flags, *LABELS[name]]) == 0
    prepared = ["prepare", str(cohort), str(store), "--workers", "0", *flags]
    assert main([*prepared, "--layout", str(cohort / "layout.yaml")]) == 0
    assert Store.open(store).task.labels == task.labels
    student = f"--config={TASKS / 'student.yaml'}"
    data = [f"--data.task={file}", f"--data.store={store}"]
    align = ["--align.weight=0.1"] if task.num_modalities > 1 else []
    assert main(["fit", student, *data, f"--run={run}", *TINY, *SPLIT, *align]) == 0
    checkpoint = f"--ckpt_path={run}/checkpoints/last.ckpt"
    assert main(["test", checkpoint, data[1], *SPLIT]) == 0
    records = pd.read_csv(run / "records.csv")
    count = 2**task.num_modalities - 1
    assert records["combination"].nunique() == count
    assert set(records["region"]) == set(task.regions)
    said = capsys.readouterr().out
    assert ("by number of sequences shown" in said) == (count > 15)
    with figures_left_empty():
        assert main(["report", str(run), "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert all(task.show(m) in page for m in task.modalities)
    assert (f"All {count} combinations" in page) == (count > 15)


def test_labels_are_tissues_of_the_phantom():
    two = read_task(TASKS / "two.yaml")
    assert label_codes(BRATS, {}) == {"NCR": 1, "ED": 2, "ET": 4}
    assert label_codes(two, {"core": "ET", "oedema": "ED"}) == {"core": 4, "oedema": 2}
    for labels in ({}, {"core": "NCR"}, {"core": "ED", "oedema": "ED"}, {"x": "ED"}):
        with pytest.raises(InputError, match="tissues"):
            label_codes(two, labels)


def test_a_phantom_of_another_sequence_needs_its_contrasts(tmp_path, capsys):
    (tmp_path / "task.yaml").write_text(
        "name: swi\nmodalities: [swi]\nlabels: [NCR, ED, ET]\nregions: {ET: [ET]}\n"
    )
    (tmp_path / "contrasts.yaml").write_text(
        "swi: {wm: 1.0, gm: 0.8, csf: 0.5, oedema: 0.1, core: -0.2}\n"
    )
    made = ["phantom", str(tmp_path / "c"), "--cases", "1", "--spacing", "6", "--workers", "0"]
    made += ["--task", str(tmp_path / "task.yaml")]
    assert main(made) == 1
    assert "swi" in capsys.readouterr().err
    assert main([*made, "--contrasts", str(tmp_path / "contrasts.yaml")]) == 0
    assert len(list((tmp_path / "c").rglob("*_swi.nii.gz"))) == 1
    assert main([*made, "--contrasts", str(tmp_path / "none.yaml")]) == 1
