import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pmixseg.data.augment import Augmentation
from pmixseg.data.keys import make_key
from pmixseg.data.resample import Turn
from pmixseg.describe import build, describe
from pmixseg.errors import InputError
from pmixseg.execution import as_on_gpu

OFF = {
    "flip": 0.0,
    "resample": 0.0,
    "shift": 0.0,
    "scale": 0.0,
    "gamma_probability": 0.0,
    "noise_probability": 0.0,
}
STILL = {"flip": 0.0, "resample": 0.0}


@pytest.fixture(params=[False, True], ids=["cpu", "as_on_gpu"], autouse=True)
def machine(request):
    """Both ways to augment."""
    with as_on_gpu(request.param):
        yield


def keys(n, epoch=0):
    return torch.tensor([make_key(0, epoch, i) for i in range(n)])


def batch(n=3, size=12, m=4, epoch=0):
    image = torch.randn(n, m, size, size, size, generator=torch.Generator().manual_seed(1))
    image[:, :, :3] = 0  # background
    acquired = torch.ones(n, m, dtype=torch.bool)
    acquired[:, 2] = False
    image[:, 2] = 0
    label = torch.randint(0, 4, (n, size, size, size), generator=torch.Generator().manual_seed(2))
    return {
        "image": image,
        "label": label,
        "case_id": [f"c{i}" for i in range(n)],
        "acquired": acquired,
        "key": keys(n, epoch),
    }


def rows(made, index):
    return {k: [v[i] for i in index] if k == "case_id" else v[index] for k, v in made.items()}


def test_off_is_identity():
    made, again = Augmentation(**OFF)(batch()), batch()
    assert torch.equal(made["image"], again["image"])
    assert torch.equal(made["label"], again["label"])


def test_is_a_function_of_the_key_alone():
    augment = Augmentation(resample=1.0, gamma_probability=0.5, noise_probability=0.5)
    whole = augment(batch())
    torch.manual_seed(123)
    for i in (2, 0, 1):
        alone = augment(rows(batch(), [i]))
        assert torch.equal(alone["image"][0], whole["image"][i])
        assert torch.equal(alone["label"][0], whole["label"][i])
    other = augment(batch(epoch=1))
    assert not torch.equal(other["image"], whole["image"])
    assert torch.equal(build(describe(augment))(batch())["image"], whole["image"])


def test_keys_given_apart_replace_those_of_the_batch():
    augment = Augmentation()
    expected = augment(batch(epoch=1))["image"]
    assert torch.equal(augment(batch(epoch=0), keys=keys(3, 1))["image"], expected)


@pytest.mark.parametrize("seed", range(4))
def test_background_and_absent_modalities_stay_zero(seed):
    augment = Augmentation(
        **STILL, gamma_probability=1.0, noise_probability=1.0, shift=0.5, noise=0.5
    )
    made, before = augment(batch(epoch=seed)), batch(epoch=seed)
    assert torch.equal(made["image"] != 0, before["image"] != 0)
    assert not torch.equal(made["image"], before["image"])
    assert torch.equal(made["label"], before["label"])
    turned = Augmentation(resample=1.0, noise_probability=1.0, gamma_probability=1.0)(batch())
    assert (turned["image"][:, 2] == 0).all()
    assert torch.isfinite(turned["image"]).all()


def test_shift_and_scale_by_hand():
    made, before = Augmentation(**{**OFF, "shift": 0.4, "scale": 0.3})(batch(200, 4)), batch(200, 4)
    brain = before["image"][:, [0, 1, 3], 3:]
    after = made["image"][:, [0, 1, 3], 3:]
    # Two voxels fix the line; all others must lie on it.
    x, y = brain.flatten(2), after.flatten(2)
    scale = (y[..., 1] - y[..., 0]) / (x[..., 1] - x[..., 0])
    shift = y[..., 0] - scale * x[..., 0]
    torch.testing.assert_close(y, scale[..., None] * x + shift[..., None], atol=1e-3, rtol=1e-3)
    assert scale.min() > 0.699 and scale.max() < 1.301 and scale.std() > 0.15
    assert shift.min() > -0.41 and shift.max() < 0.41 and shift.std() > 0.2
    assert abs(torch.corrcoef(torch.stack([scale[:, 0], scale[:, 1]]))[0, 1]) < 0.2
    assert abs(torch.corrcoef(torch.stack([scale[:, 0], shift[:, 0]]))[0, 1]) < 0.2


def test_gamma_keeps_range_and_order():
    augment = Augmentation(**{**OFF, "gamma": 0.5, "gamma_probability": 1.0})
    made, before = augment(batch()), batch()
    for b in range(3):
        for m in (0, 1, 3):
            x, y = before["image"][b, m], made["image"][b, m]
            assert x.max() == pytest.approx(float(y.max()), abs=1e-5)
            assert x.min() == pytest.approx(float(y.min()), abs=1e-5)
            order = x[3:].flatten().argsort()
            assert (y[3:].flatten()[order].diff() > -1e-6).all()
            # The exponent, recovered from one voxel, holds for all of them.
            unit = ((x - x.min()) / (x.max() - x.min()))[3:].flatten()[order][5:-5]
            power = ((y - y.min()) / (y.max() - y.min()))[3:].flatten()[order][5:-5]
            gamma = power.log() / unit.log()
            assert gamma.std() < 0.01 and 0.6 < gamma.mean() < 1.65


def test_noise_has_its_strength_and_differs_between_modalities():
    augment = Augmentation(**{**OFF, "noise": 0.5, "noise_probability": 1.0})
    made, before = augment(batch(40, 10)), batch(40, 10)
    noise = (made["image"] - before["image"])[:, [0, 1, 3], 3:].flatten(2)
    strength = noise.std(2)
    assert strength.max() < 0.55 and abs(strength.mean() - 0.25) < 0.04
    assert noise.mean(2).abs().max() < 0.1
    assert abs(torch.corrcoef(noise[0, :2])[0, 1]) < 0.15


def test_gamma_and_noise_are_drawn_apart():
    changed = []
    for only in ("gamma_probability", "noise_probability"):
        made = Augmentation(**{**OFF, only: 0.5})(batch(100, 4))["image"]
        changed.append((made != batch(100, 4)["image"])[:, [0, 1, 3]].flatten(2).any(2))
    assert abs((changed[0] == changed[1]).double().mean() - 0.5) < 0.12


def test_the_defaults_are_those_of_rfnet():
    """Degrees up to ±10, intensities shifted by ±0.1 and scaled by 0.9 to 1.1, half flipped."""
    default = Augmentation()
    assert (default.rotation, default.shift, default.scale) == (10, 0.1, 0.1)
    assert default.flip == (0.5, 0.5, 0.5)


def test_turns_are_drawn_as_promised():
    made = Augmentation(flip=(0.5, 0.0, 1.0), resample=0.25, rotation=15.0, zoom=0.2).turns(
        keys(4000)
    )
    drawn = [t for t in made if t.resamples]
    assert abs(len(drawn) / 4000 - 0.25) < 0.03
    assert [sum(t.axis == a for t in drawn) > 280 for a in range(3)] == [True] * 3
    assert all(abs(t.degrees) <= 15 and 0.8 <= t.zoom <= 1.2 for t in drawn)
    assert min(t.degrees for t in drawn) < -14 and max(t.degrees for t in drawn) > 14
    assert min(t.zoom for t in drawn) < 0.81 and max(t.zoom for t in drawn) > 1.19
    flips = torch.tensor([t.flips for t in made]).double().mean(0)
    assert abs(flips[0] - 0.5) < 0.03 and flips[1] == 0 and flips[2] == 1


def test_image_and_label_move_together():
    made = batch(8, 16)
    made["image"] = made["label"][:, None].float().repeat(1, 4, 1, 1, 1)
    smooth = torch.nn.functional.avg_pool3d(made["image"], 5, 1, 2)
    made["image"], made["label"] = smooth.clone(), (smooth[:, 0] > 1.5).long()
    out = Augmentation(**{**OFF, "flip": 0.5, "resample": 1.0})(made)
    inner = (slice(None), slice(5, 11), slice(5, 11), slice(5, 11))
    agreement = ((out["image"][:, 0] > 1.5).long() == out["label"])[inner].float().mean()
    assert agreement > 0.9


def test_flip_only_changes_nothing_but_order():
    made = Augmentation(**{**OFF, "flip": 1.0})(batch())
    assert torch.equal(made["image"], batch()["image"].flip(2, 3, 4))
    assert Augmentation(**{**OFF, "flip": 1.0}).turns(keys(1)) == [
        Turn(axis=Augmentation(**OFF).turns(keys(1))[0].axis, flips=(True, True, True))
    ]


@pytest.mark.parametrize(
    "wrong", [{"flip": 1.5}, {"flip": (0.5, 0.5)}, {"resample": -0.1}, {"zoom": 1.0}, {"noise": -1}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(InputError):
        Augmentation(**wrong)


def test_both_ways_are_one_function():
    """Without noise, whose generators differ."""
    augment = Augmentation(
        resample=0.5, rotation=30.0, zoom=0.3, gamma_probability=0.5, noise_probability=0.0
    )
    made, spacing = batch(8, 13), (1.0, 2.0, 1.5)
    with as_on_gpu():
        together = augment(batch(8, 13), None, spacing)
    with as_on_gpu(False):
        there = augment(made, None, spacing)
    assert 0 < sum(turn.resamples for turn in augment.turns(made["key"])) < 8
    torch.testing.assert_close(together["image"], there["image"], rtol=0, atol=2e-5)
    assert torch.equal(together["label"], there["label"])


class Kernels(TorchDispatchMode):
    """Counts operations on volumes."""

    def __init__(self):
        super().__init__()
        self.volumes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        large = isinstance(made, torch.Tensor) and made.numel() >= 12**3
        self.volumes += large and not function.is_view
        return made


def test_a_gpu_augments_a_batch_of_any_size_in_a_handful_of_operations():
    augment = Augmentation(resample=1.0, gamma_probability=1.0, noise_probability=0.0)
    counts = []
    for samples in (2, 8):
        with as_on_gpu(), Kernels() as counter:
            augment(batch(samples))
        counts.append(counter.volumes)
    assert counts[0] == counts[1] <= 25


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu():
    augment = Augmentation(resample=1.0, gamma_probability=0.5, noise_probability=0.0)
    on_gpu = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batch().items()}
    there, here = augment(on_gpu), augment(batch())
    torch.testing.assert_close(there["image"].cpu(), here["image"], atol=1e-4, rtol=1e-4)
    assert torch.equal(there["label"].cpu(), here["label"])
