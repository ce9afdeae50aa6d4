from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn.functional import cross_entropy
from torchmetrics.classification import BinaryCalibrationError

from pmixseg.callbacks.temperatures import TemperatureFitting
from pmixseg.errors import InputError
from pmixseg.evaluation.prediction.cases import EvaluationSettings
from pmixseg.evaluation.scores.calibration import (
    CaseCalibration,
    TemperatureFit,
    Temperatures,
    reliability,
    tempered,
)
from pmixseg.task import BRATS


def made_up(seed=0, shape=(8, 9, 10), sharpness=2.0):
    draw = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(4, *shape, generator=draw)
    truth = torch.randint(0, 4, shape, generator=draw)
    return logits.softmax(0), truth


def test_torchmetrics_finds_the_same_ece():
    probabilities, truth = made_up()
    where = torch.rand(truth.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    calibration = reliability(probabilities, truth, BRATS, where)
    for region in BRATS.regions:
        members = torch.tensor(BRATS.region_classes(region))
        p = probabilities[members].sum(0)[where]
        y = torch.isin(truth, members)[where]
        oracle = BinaryCalibrationError(n_bins=15, norm="l1")(p, y.int()).item()
        assert calibration[region].ece == pytest.approx(oracle, rel=1e-5)
        assert calibration[region].brier == pytest.approx(
            ((p - y.float()) ** 2).mean().item(), rel=1e-5
        )


def test_ece_and_brier_by_hand():
    # Four voxels say 0.8, one of them wrongly; one says 0.1, rightly not ET.
    p = torch.tensor([0.8, 0.8, 0.8, 0.8, 0.1], dtype=torch.float64)
    probabilities = torch.stack([1 - p, 0 * p, 0 * p, p]).reshape(4, 5, 1, 1)
    truth = torch.tensor([3, 3, 3, 0, 0]).reshape(5, 1, 1)
    calibration = reliability(probabilities, truth, BRATS)["ET"]
    assert calibration.ece == pytest.approx(4 / 5 * abs(0.75 - 0.8) + 1 / 5 * 0.1)
    assert calibration.brier == pytest.approx((3 * 0.04 + 0.64 + 0.01) / 5)
    held = np.flatnonzero(calibration.count).tolist()
    assert held == [1, 12] and calibration.count[held].tolist() == [1, 4]
    assert calibration.confidence[held].tolist() == pytest.approx([0.1, 3.2])
    assert calibration.positive[held].tolist() == [0, 3]


def test_certain_voxels_fall_into_the_last_bin():
    probabilities = torch.tensor([0.0, 0, 0, 1]).reshape(4, 1, 1, 1)
    calibration = reliability(probabilities, torch.full((1, 1, 1), 3), BRATS)["ET"]
    assert calibration.count.tolist() == [0] * 14 + [1]
    assert calibration.ece == calibration.brier == 0.0


def test_no_voxel_gives_nan():
    probabilities, truth = made_up()
    calibration = reliability(
        probabilities, truth, BRATS, torch.zeros_like(truth, dtype=torch.bool)
    )
    assert all(math.isnan(r.ece) and math.isnan(r.brier) for r in calibration.values())


def test_voxels_that_a_prediction_does_not_reach_are_certain_background():
    probabilities, truth = made_up()
    where = torch.rand(truth.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    box = (slice(2, 7), slice(0, 5), slice(3, 10))
    whole = torch.zeros_like(probabilities)
    whole[0] = 1
    whole[(slice(None), *box)] = probabilities[(slice(None), *box)]
    scores = CaseCalibration(truth, BRATS, where)
    for _ in range(2):  # the second time from what was remembered
        calibration = scores.score(probabilities[(slice(None), *box)], box)
        for region, expected in reliability(whole, truth, BRATS, where).items():
            assert calibration[region].count.tolist() == expected.count.tolist()
            assert calibration[region].positive.tolist() == expected.positive.tolist()
            assert calibration[region].ece == pytest.approx(expected.ece)
            assert calibration[region].brier == pytest.approx(expected.brier)


def drawn_from(logits, seed):
    rng = np.random.default_rng(seed)
    p = logits.softmax(0).flatten(1).numpy().cumsum(0)
    u = rng.random(p.shape[1])
    return torch.from_numpy((u > p[:-1]).sum(0)).reshape(logits.shape[1:])


def test_the_temperature_of_an_overconfident_network_is_found_per_size():
    fit = TemperatureFit(voxels_per_case=8000)
    expected = {1: 3.0, 2: 1.5, 4: 0.7}
    for seed, (size, temperature) in enumerate(expected.items()):
        for case in range(3):
            draw = torch.Generator().manual_seed(10 * seed + case)
            true_logits = 2 * torch.randn(4, 20, 20, 20, generator=draw, dtype=torch.float64)
            fit.add(true_logits * temperature, drawn_from(true_logits, 10 * seed + case), size)
    assert fit.temperatures().by_size == pytest.approx(expected, rel=0.03)


def test_the_fit_is_the_least_cross_entropy_and_mends_calibration():
    draw = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(4, 12, 12, 12, generator=draw, dtype=torch.float64)
    truth = drawn_from(logits / 2.5, 0)
    fit = TemperatureFit()
    fit.add(logits, truth, 3)
    temperatures = fit.temperatures()
    flat = logits.flatten(1).T

    def loss(t):
        return cross_entropy(flat / t, truth.flatten()).item()

    oracle = minimize_scalar(loss, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-8}).x
    assert temperatures.by_size[3] == pytest.approx(oracle, rel=1e-4)
    before = logits.softmax(0)
    after = tempered(before, temperatures.by_size[3])
    torch.testing.assert_close(
        after, (logits / temperatures.by_size[3]).softmax(0), atol=1e-3, rtol=0
    )
    assert torch.equal(after.argmax(0), before.argmax(0))
    ece = [reliability(p, truth, BRATS)["WT"].ece for p in (before, after)]
    assert ece[1] < ece[0] / 3


def test_logits_and_log_probabilities_fit_alike():
    draw = torch.Generator().manual_seed(2)
    logits = torch.randn(4, 6, 6, 6, generator=draw, dtype=torch.float64)
    truth = torch.randint(0, 4, (6, 6, 6), generator=draw)
    fits = []
    for values in (logits, logits.log_softmax(0)):
        fit = TemperatureFit()
        fit.add(values, truth, 1)
        fits.append(fit.temperatures().by_size[1])
    assert fits[0] == pytest.approx(fits[1])


def test_a_size_without_a_temperature_is_left_alone():
    probabilities, _ = made_up()
    unlisted = EvaluationSettings(temperatures={1: 2.0}).temperature(2)
    assert tempered(probabilities, unlisted) is probabilities


def test_temperatures_survive_json_and_bad_ones_are_refused():
    settings = EvaluationSettings(temperatures={1: 2.5, 4: 1.0})
    assert EvaluationSettings.of(json.loads(json.dumps(settings.to_dict()))) == settings
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="temperatures"):
            Temperatures({1: bad})
    with pytest.raises(InputError, match="voxel"):
        TemperatureFit().temperatures()


def test_a_network_that_is_never_wrong_gets_the_sharpest_temperature_allowed():
    logits = torch.tensor([5.0, 0.0]).reshape(2, 1, 1, 1)
    fit = TemperatureFit()
    fit.add(logits, torch.zeros(1, 1, 1, dtype=torch.long), 1)
    assert fit.temperatures().by_size[1] == pytest.approx(0.05, rel=1e-3)


def test_cross_entropy_by_hand():
    fit = TemperatureFit()
    fit.add(torch.tensor([2.0, 0.0]).reshape(2, 1, 1, 1), torch.ones(1, 1, 1), 2)
    assert fit.cross_entropy(2, 1.0) == pytest.approx(math.log1p(math.exp(2)))
    assert fit.cross_entropy(2, 2.0) == pytest.approx(math.log1p(math.exp(1)))


def mostly_background():
    """Sure and right in 95 of 100 voxels; in the others as sure, and wrong in half of them."""
    p = torch.full((4, 1000), 0.02 / 3)
    p[0] = 0.98
    truth = torch.zeros(1000, dtype=torch.long)
    p[:, :50] = torch.tensor([0.001, 0.001, 0.001, 0.997])[:, None]
    truth[:25] = 3
    fit = TemperatureFit()
    fit.add(p.log()[..., None, None], truth[:, None, None], n_present=2)
    return fit, p, truth


def test_the_error_of_the_fitted_voxels_is_that_of_torchmetrics():
    fit, p, truth = mostly_background()
    for temperature in (1.0, 2.5):
        heated = (p.log() / temperature).softmax(0)
        expected = [
            BinaryCalibrationError(n_bins=15, norm="l1")(
                heated[list(members)].sum(0), torch.isin(truth, torch.tensor(members)).int()
            ).item()
            for members in map(BRATS.region_classes, BRATS.regions)
        ]
        ece = fit.ece(2, temperature, BRATS)
        assert ece == pytest.approx(np.mean(expected), rel=1e-4)


def test_a_temperature_that_spoils_the_calibration_error_is_called_so(tmp_path):
    fitting = TemperatureFitting(tmp_path / "x.ckpt")
    fitting.fit, *_ = mostly_background()
    (t,) = fitting.fit.temperatures().by_size.values()
    assert t > 1.1
    assert fitting.fit.cross_entropy(2, t) < fitting.fit.cross_entropy(2, 1.0)
    assert fitting.fit.ece(2, t, BRATS) > fitting.fit.ece(2, 1.0, BRATS)
    (caution,) = fitting.cautions(Temperatures({2: t}), BRATS)
    assert "with 2 shown the calibration error (ECE) rises" in caution
    assert not list(fitting.cautions(Temperatures({2: 1.0}), BRATS))
    end = next(fitting.cautions(Temperatures({2: 0.05}), BRATS))
    assert "at an end of its range (0.05 to 20)" in end
