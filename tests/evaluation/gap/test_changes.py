"""The gap of the weights that were kept, not of others that happened to be measured."""

from dataclasses import replace

import pandas as pd
import pytest

from pmixseg.evaluation.gap.changes import read_gap_changes
from pmixseg.evaluation.records.records import Records
from pmixseg.evaluation.report.page import write_report
from tests.evaluation.made_up import made_up_rows
from tests.evaluation.report.test_report import make_run

START = (-1, 0, None, 0.75, 0)


def write(folder, *rows):
    """Rows of epoch, step, Dice, gap and collapse."""
    names = ["epoch", "step", "val/dice", "gap/level0/ratio", "gap/level0/collapsed"]
    table = pd.DataFrame([START, *rows], columns=names).astype(float)
    table.to_csv(folder / "metrics.csv", index=False)


@pytest.mark.parametrize(
    ("rows", "after", "collapsed"),
    [
        # Every second validation was measured, and the best is another.
        ([(1, 19, 0.4, 0.5, 0), (2, 29, 0.8, None, None), (3, 39, 0.6, 0.1, 1)], {}, None),
        ([(1, 19, 0.4, 0.5, 0), (2, 29, 0.8, 0.3, 0), (3, 39, 0.6, 0.1, 1)], {"ratio": 0.3}, False),
        # The best is the last, which is measured when training ends.
        (
            [(1, 19, 0.4, 0.5, 0), (2, 29, 0.8, None, None), (2, 30, None, 0.1, 1)],
            {"ratio": 0.1},
            1,
        ),
        # The best is within the last epoch, and steps followed.
        ([(2, 24, 0.8, None, None), (2, 29, 0.7, None, None), (2, 30, None, 0.1, 1)], {}, None),
        # Without validation the last is what there is.
        ([(2, 30, None, 0.1, 1)], {"ratio": 0.1}, True),
    ],
)
def test_the_best_is_looked_for_among_all_validations(tmp_path, rows, after, collapsed):
    write(tmp_path, *rows)
    (change,) = read_gap_changes(tmp_path, best=True)
    assert change.before == {"ratio": 0.75}
    assert (change.after, change.collapsed) == (after, collapsed)
    last = next(row for row in reversed(rows) if row[3] is not None)
    assert read_gap_changes(tmp_path)[0].after == {"ratio": last[3]}


@pytest.mark.parametrize("best", [True, False])
def test_a_damaged_log_has_the_changes_that_it_holds(tmp_path, best):
    log = tmp_path / "metrics.csv"
    log.write_text("epoch,step,gap/level0/ratio\n0,1,\n")
    assert read_gap_changes(tmp_path, best) == []
    log.write_text("val/dice,gap/level0/ratio\n,0.5\n0.7,\n")  # and no epochs
    (change,) = read_gap_changes(tmp_path, best)
    assert (change.before, change.after) == ({"ratio": 0.5}, {} if best else {"ratio": 0.5})


def test_the_report_says_that_it_was_not_measured(tmp_path):
    run = make_run(tmp_path, "aligned", made_up_rows())
    records = Records.read(run)
    sidecar = replace(records.sidecar, checkpoint={"file": "best.ckpt", "sha256": "0"})
    replace(records, sidecar=sidecar).write(run)
    write(run, (1, 19, 0.4, 0.5125, 1), (2, 29, 0.8, None, None))
    page = write_report([run], tmp_path / "out", images=False).read_text()
    section = page[page.index("Gap between sequences") :]
    section = section[: section.index("</section>")]
    assert "not measured" in section
    assert "0.750" in section
    assert "0.512" not in section
    assert ">yes<" not in section
