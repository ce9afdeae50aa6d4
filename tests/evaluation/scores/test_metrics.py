from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from medpy.metric import binary as medpy
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_surface_dice,
)

from pmixseg.errors import InputError
from pmixseg.evaluation.scores.metrics import REGION_MEASURES, CaseMetrics, Conventions, region_dice
from pmixseg.task import BRATS, Task
from tests.evaluation.scores.mask_pairs import SPACINGS, mask_pairs

LESION = Task(name="one", modalities=("a",), labels=("lesion",), regions={"L": ("lesion",)})
PAIRS = list(mask_pairs(234))
REAL = Path(__file__).parents[3] / "../shared/data/brats2021"


def score(prediction, truth, spacing=(1, 1, 1), **conventions):
    case = CaseMetrics(truth.astype(np.uint8), LESION, spacing, Conventions(**conventions))
    return case.score(prediction.astype(np.uint8))[0]


def both(prediction, truth):
    return prediction.any() and truth.any()


def channel(mask):
    return torch.from_numpy(np.ascontiguousarray(mask))[None, None]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(is all 0|may result in nan).*")
        yield


def test_medpy_agrees_on_every_pair():
    compared = 0
    for name, prediction, truth, spacing in PAIRS:
        row = score(prediction, truth, spacing)
        if not both(prediction, truth):
            continue
        compared += 1
        assert row["dice"] == pytest.approx(medpy.dc(prediction, truth), abs=1e-12), name
        assert row["hd95"] == pytest.approx(medpy.hd95(prediction, truth, spacing)), name
        assert row["asd"] == pytest.approx(medpy.assd(prediction, truth, spacing)), name
        assert row["sensitivity"] == pytest.approx(medpy.sensitivity(prediction, truth)), name
        assert row["precision"] == pytest.approx(medpy.precision(prediction, truth)), name
        if not truth.all():
            assert row["specificity"] == pytest.approx(medpy.specificity(prediction, truth)), name
    assert compared >= 170


def test_monai_agrees_on_every_pair():
    for name, prediction, truth, spacing in PAIRS:
        row = score(prediction, truth, spacing, percentile="max_directed")
        p, t = channel(prediction), channel(truth)
        dice = compute_dice(p.float(), t.float(), ignore_empty=False).item()
        assert row["dice"] == pytest.approx(dice, abs=1e-6), name
        nsd = compute_surface_dice(
            p, t, [1.0], include_background=True, spacing=spacing, use_subvoxels=True
        ).item()
        assert row["nsd"] == pytest.approx(1.0 if math.isnan(nsd) else nsd, abs=1e-5), name
        if not both(prediction, truth):
            continue
        hd95 = compute_hausdorff_distance(p, t, True, percentile=95, spacing=spacing).item()
        assert row["hd95"] == pytest.approx(hd95, rel=1e-5), name
        asd = compute_average_surface_distance(p, t, True, symmetric=True, spacing=spacing).item()
        assert row["asd"] == pytest.approx(asd, rel=1e-5, abs=1e-6), name


def test_medpy_and_monai_disagree_so_the_rule_matters():
    rules = [
        {score(p, t, s, percentile=rule)["hd95"] for rule in ("pooled", "max_directed")}
        for _, p, t, s in PAIRS[:26]
    ]
    assert any(len(values) == 2 for values in rules)


@pytest.mark.parametrize("tolerance", [0.0, 0.5, 2.0, 4.0, 20.0])
def test_surface_dice_agrees_at_any_tolerance(tolerance):
    for name, prediction, truth, spacing in PAIRS[:52]:
        expected = compute_surface_dice(
            channel(prediction),
            channel(truth),
            [tolerance],
            include_background=True,
            spacing=spacing,
            use_subvoxels=True,
        ).item()
        actual = score(prediction, truth, spacing, nsd_tolerance_mm=tolerance)["nsd"]
        assert actual == pytest.approx(1.0 if math.isnan(expected) else expected, abs=1e-5), name


def test_surface_distance_package_gave_these_numbers():
    golden = json.loads((Path(__file__).parent / "golden/surface_distance.json").read_text())
    pairs = {name: (p, t, s) for name, p, t, s in mask_pairs(golden["pairs"], golden["seed"])}
    assert len(golden["nsd"]) >= 170
    for name, expected in golden["nsd"].items():
        prediction, truth, spacing = pairs[name]
        assert score(prediction, truth, spacing)["nsd"] == pytest.approx(expected, abs=1e-6), name


def test_a_cube_and_its_shift_by_hand():
    truth = np.zeros((10, 10, 10), bool)
    truth[2:6, 2:6, 2:6] = True
    prediction = np.roll(truth, 1, axis=2)
    row = score(prediction, truth, (1, 1, 2))
    # 64 voxels each, 48 shared; 2 mm apart along the last axis.
    assert row["dice"] == 0.75
    assert row["sensitivity"] == row["precision"] == 0.75
    assert row["specificity"] == pytest.approx((1000 - 64 - 16) / (1000 - 64))
    # Each surface has 56 voxels. The 16 of the leading face are 2 mm from the other surface; of the
    # opposite face the ring of 12 lies in it and the 4 inside are 1 mm away; all others lie in it.
    assert row["hd95"] == 2.0
    assert row["asd"] == pytest.approx((16 * 2 + 4 * 1) / 56)
    assert row["volume_ml"] == row["truth_volume_ml"] == pytest.approx(0.128)
    assert row["volume_error_ml"] == 0.0
    assert row["empty"] == "none"
    assert not row["presence_fp"]
    assert not row["presence_fn"]


def test_percentile_rules_by_hand():
    # Truth: one voxel. Prediction: that voxel and 19 on a line: 0, 1, ..., 19 mm away.
    truth = np.zeros((20, 1, 1), bool)
    truth[0] = True
    prediction = np.ones((20, 1, 1), bool)
    # Directed distances: 0..19 one way, 0 the other way.
    assert score(prediction, truth)["hd95"] == pytest.approx(np.percentile([0, *range(20)], 95))
    maximal = score(prediction, truth, percentile="max_directed")["hd95"]
    assert maximal == pytest.approx(18.05)
    assert score(prediction, truth)["asd"] == pytest.approx(190 / 21)


@pytest.mark.parametrize(
    ("rule", "one_empty", "both_empty"),
    [("brats", 373.12866, 0.0), ("one", 1.0, 0.0), ("zero", 0.0, 0.0), ("nan", None, None)],
)
def test_empty_masks_count_what_the_convention_says(rule, one_empty, both_empty):
    nothing = np.zeros((4, 5, 6), bool)
    something = nothing.copy()
    something[1, 2, 3] = True
    missed = score(nothing, something, hd95=rule)
    invented = score(something, nothing, hd95=rule)
    neither = score(nothing, nothing, hd95=rule)
    for row in (missed, invented):
        assert row["dice"] == row["nsd"] == 0.0
        for measure in ("hd95", "asd"):
            assert row[measure] == one_empty or (one_empty is None and math.isnan(row[measure]))
    assert neither["dice"] == neither["nsd"] == 1.0
    assert neither["hd95"] == both_empty or (both_empty is None and math.isnan(neither["hd95"]))
    assert [r["empty"] for r in (missed, invented, neither)] == ["prediction", "truth", "both"]
    assert [r["presence_fn"] for r in (missed, invented, neither)] == [True, False, False]
    assert [r["presence_fp"] for r in (missed, invented, neither)] == [False, True, False]
    assert [r["volume_error_ml"] for r in (missed, invented, neither)] == [-0.001, 0.001, 0.0]
    assert missed["sensitivity"] == 0.0
    assert math.isnan(missed["precision"])
    assert math.isnan(invented["sensitivity"])
    assert invented["specificity"] == pytest.approx(119 / 120)


def test_regions_are_unions_of_labels():
    truth = np.zeros((6, 6, 6), np.uint8)
    truth[1:5, 1:5, 1:5] = 2
    truth[2:4, 2:4, 2:4] = 1
    truth[2, 2, 2] = 3
    prediction = np.where(truth == 3, 1, truth).astype(np.uint8)
    rows = {r["region"]: r for r in CaseMetrics(truth, BRATS, (1, 1, 1)).score(prediction)}
    assert [rows[r]["dice"] for r in ("WT", "TC", "ET")] == [1.0, 1.0, 0.0]
    assert [rows[r]["truth_volume_ml"] for r in ("WT", "TC", "ET")] == [0.064, 0.008, 0.001]
    assert rows["ET"]["hd95"] == 373.12866


def test_one_case_scores_many_predictions_as_if_alone():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 4, (9, 8, 7)).astype(np.uint8)
    case = CaseMetrics(truth, BRATS, (1, 2, 0.5))
    for _ in range(4):
        prediction = rng.integers(0, 4, truth.shape).astype(np.uint8)
        assert case.score(prediction) == CaseMetrics(truth, BRATS, (1, 2, 0.5)).score(prediction)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    pad=st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 3),
    axes=st.permutations([0, 1, 2]),
    spacing=st.sampled_from(SPACINGS),
)
def test_scores_are_symmetric_and_ignore_position_and_axis_order(seed, pad, axes, spacing):
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, 8, 3)
    a, b = (rng.random(shape) < rng.uniform(0, 0.8) for _ in range(2))
    kept = ("dice", "hd95", "asd", "nsd")
    rows = score(a, b, spacing)
    swapped = score(b, a, spacing)
    # Beyond the array there is nothing, so a mask at its border keeps its score when it grows.
    moved = score(
        np.pad(a, pad).transpose(axes), np.pad(b, pad).transpose(axes), [spacing[i] for i in axes]
    )
    for other in (swapped, moved):
        assert [other[k] for k in kept] == pytest.approx([rows[k] for k in kept], rel=1e-6)
    assert rows["volume_error_ml"] == pytest.approx(-swapped["volume_error_ml"])
    if rows["empty"] == "none":
        scaled = score(a, b, [2 * s for s in spacing], nsd_tolerance_mm=2.0)
        assert scaled["hd95"] == pytest.approx(2 * rows["hd95"])
        assert scaled["nsd"] == pytest.approx(rows["nsd"])


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)])
def test_memory_order_changes_no_score(axes):
    rng = np.random.default_rng(3)
    truth = np.zeros((9, 10, 11), np.uint8)
    truth[2:8, 3:5, 1:10] = rng.integers(0, 4, (6, 2, 9))
    prediction = np.roll(truth, 1, 1)
    expected = CaseMetrics(truth, BRATS, (1, 2, 3)).score(prediction)
    back = np.argsort(axes)
    t, p = (np.ascontiguousarray(v.transpose(axes)).transpose(back) for v in (truth, prediction))
    assert CaseMetrics(t, BRATS, (1, 2, 3)).score(p[:, :, ::-1][:, :, ::-1]) == expected


def test_only_computes_what_is_asked():
    truth = np.zeros((5, 5, 5), np.uint8)
    truth[1:3, 1:3, 1:3] = 3
    case = CaseMetrics(truth, BRATS, (1, 1, 1))
    full, few = case.score(truth), case.score(truth, only=("hd95", "dice"))
    assert [set(r) for r in few] == [{"region", "dice", "hd95"}] * 3
    assert list(full[0]) == ["region", *REGION_MEASURES]
    with pytest.raises(InputError, match=r"'hd'.*unknown"):
        case.score(truth, only=("hd",))


def test_quick_dice_equals_the_scored_dice():
    rng = np.random.default_rng(0)
    for high in (1, 2, 4):
        truth = rng.integers(0, 4, (6, 7, 8)).astype(np.uint8)
        prediction = rng.integers(0, high, truth.shape).astype(np.uint8)
        rows = CaseMetrics(truth, BRATS, (1, 1, 1)).score(prediction, only=("dice",))
        quick = region_dice(torch.from_numpy(prediction), torch.from_numpy(truth).long(), BRATS)
        assert quick == {r["region"]: pytest.approx(r["dice"]) for r in rows}


def test_more_regions_than_bits_of_a_byte():
    labels = tuple(f"l{i}" for i in range(12))
    many = Task(name="many", modalities=("a",), labels=labels, regions={n: (n,) for n in labels})
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 13, (7, 7, 7)).astype(np.uint8)
    prediction = np.where(rng.random(truth.shape) < 0.5, truth, 0).astype(np.uint8)
    for i, row in enumerate(CaseMetrics(truth, many, (1, 1, 1)).score(prediction)):
        alone = score(prediction == i + 1, truth == i + 1)
        assert {k: row[k] for k in REGION_MEASURES} == {k: alone[k] for k in REGION_MEASURES}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t[:-1], "shape"),
        (lambda t: t + 5, "class index 6"),
        (lambda t: t.astype(np.int16) - 2, "class index -2"),
        (lambda t: t.astype(np.float32), "integer"),
        (lambda t: t[0], "three-dimensional"),
    ],
)
def test_wrong_predictions_are_refused(change, sentence):
    truth = np.zeros((4, 4, 4), np.uint8)
    truth[1, 1, 1] = 1
    with pytest.raises(InputError, match=sentence):
        CaseMetrics(truth, BRATS, (1, 1, 1)).score(change(truth))


def test_wrong_spacing_and_conventions_are_refused():
    truth = np.zeros((4, 4, 4), np.uint8)
    for spacing in ((1, 1), (1, 1, 0), (1, 1, math.nan)):
        with pytest.raises(InputError, match="spacing"):
            CaseMetrics(truth, BRATS, spacing)
    with pytest.raises(InputError, match="hd95 is 'brast'; give brats or one"):
        Conventions(hd95="brast")
    with pytest.raises(InputError, match="tolerance"):
        Conventions(nsd_tolerance_mm=-1)


@pytest.mark.parametrize("rule", ["brats", "nan"])
def test_conventions_survive_json(rule):
    conventions = Conventions(hd95=rule, percentile="max_directed", nsd_tolerance_mm=2.0)
    raw = json.loads(json.dumps(conventions.to_dict(), allow_nan=False))
    assert Conventions.from_dict(raw) == conventions
    assert Conventions.from_dict({**raw, "later": 1}) == conventions


@pytest.mark.real
@pytest.mark.skipif(not REAL.exists(), reason="no real scans in ../shared/data/brats2021")
def test_real_masks_score_as_medpy_and_monai():
    import nibabel as nib

    path = next(REAL.glob("*/*00014_seg.nii.gz"))
    truth = np.asarray(nib.load(path).dataobj).astype(np.uint8)
    truth[truth == 4] = 3
    prediction = np.roll(truth, (2, -1, 1), (0, 1, 2))
    prediction[:, :110] = 0
    pooled = CaseMetrics(truth, BRATS, (1, 1, 1)).score(prediction)
    directed = CaseMetrics(truth, BRATS, (1, 1, 1), Conventions(percentile="max_directed"))
    crop = (slice(120, 185), slice(80, 160), slice(5, 75))
    for row, other in zip(pooled, directed.score(prediction), strict=True):
        members = BRATS.region_classes(row["region"])
        p, t = (np.isin(v[crop], members) for v in (prediction, truth))
        assert p.sum() == np.isin(prediction, members).sum()
        assert row["dice"] == pytest.approx(medpy.dc(p, t))
        assert row["hd95"] == pytest.approx(medpy.hd95(p, t))
        monai = compute_hausdorff_distance(channel(p), channel(t), True, percentile=95).item()
        assert other["hd95"] == pytest.approx(monai, rel=1e-6)
