"""Made-up results, shared by the tests of tables and reports."""

import pytest

from pmixseg.evaluation.records.records import Records
from pmixseg.evaluation.records.sidecar import Sidecar
from pmixseg.task import BRATS
from tests.evaluation.made_up import made_up_rows


@pytest.fixture
def rows():
    return made_up_rows()


@pytest.fixture
def records(rows):
    conventions = {"dice_both_empty": 1.0, "hd95_one_empty": 373.13, "hd95_rule": "pooled"}
    sidecar = Sidecar(BRATS, conventions=conventions, phantom=True, part="test")
    return Records.from_rows(rows, "demo", sidecar)
