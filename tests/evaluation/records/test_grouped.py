"""More than 15 combinations are shown by number of sequences."""

import io

import pytest
from rich.console import Console

from pmixseg.evaluation.records.grouped import group_by_size, result_table
from pmixseg.evaluation.records.records import Records
from pmixseg.evaluation.records.sidecar import Sidecar
from pmixseg.evaluation.records.tables import tabulate
from pmixseg.evaluation.report.page import write_report
from pmixseg.task import BRATS, Task
from tests.evaluation.made_up import made_up_rows

FIVE = Task("five", ("a", "b", "c", "d", "e"), ("x",), {"lesion": ("x",)})


def records_of(name, **options):
    rows = made_up_rows(task=FIVE, **options)
    return Records.from_rows(rows, name, Sidecar(FIVE, phantom=True))


def printed(table):
    stream = io.StringIO()
    Console(file=stream, width=200).print(table)
    return stream.getvalue()


def test_values_are_means_over_combinations_of_a_size():
    table = tabulate([records_of("one")])
    assert len(table.combinations) == 31
    grouped = group_by_size(table)
    assert grouped.sizes == (5, 10, 10, 5, 1)
    (line,) = grouped.lines
    values = table.lines[0].values
    assert line.values[0] == pytest.approx(sum(values[:5]) / 5)
    assert line.values[2] == pytest.approx(sum(values[15:25]) / 10)
    assert line.values[4] == values[30]
    assert line.mean == table.lines[0].mean
    assert grouped.frame().columns.tolist() == ["region", "run", "1", "2", "3", "4", "5", "mean"]


def test_the_best_run_is_marked_per_size():
    grouped = group_by_size(tabulate([records_of("low"), records_of("high", gain=0.05)]))
    low, high = grouped.lines
    assert all(high.best) and not any(low.best)


def test_terminal_and_report_group_from_31_on_and_not_before(tmp_path, records):
    text = printed(result_table(records_of("one")))
    assert "by number of sequences shown" in text
    assert "●" not in text
    assert "●" in printed(result_table(records, width=200))
    assert BRATS.num_modalities == 4
    run = tmp_path / "run"
    records_of("run").write(run / "records.csv")
    page = write_report([run], tmp_path / "out").read_text()
    assert page.count('class="sizes"') >= 1
    assert "<summary>All 31 combinations</summary>" in page
    small = tmp_path / "small"
    records.write(small / "records.csv")
    assert 'class="sizes"' not in write_report([small], tmp_path / "out2").read_text()
