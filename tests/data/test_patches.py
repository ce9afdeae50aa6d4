import pickle
from collections import Counter

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from pmixseg.data.cohorts.layouts import find_cases
from pmixseg.data.patches import CaseDataset, PatchDataset, PatchTransform
from pmixseg.data.store.store import Store, prepare
from pmixseg.task import BRATS

ACQUIRED = (True, False, True, True)
SHAPE = (30, 34, 28)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three small scans: complete, one without T1ce, one whose brain is smaller than a patch."""
    root = tmp_path_factory.mktemp("cohort")
    rng = np.random.default_rng(0)
    for name, brain, tumour in (
        ("BraTS2021_00001", (slice(3, 27), slice(2, 30), slice(4, 26)), slice(10, 16)),
        ("BraTS2021_00002", (slice(8, 24), slice(9, 33), slice(0, 17)), slice(12, 14)),
        ("BraTS2021_00003", (slice(16, 22), slice(9, 15), slice(9, 15)), slice(12, 14)),
    ):
        (root / name).mkdir()
        for m in BRATS.modalities:
            if m == "t1ce" and name.endswith("2"):
                continue
            volume = np.zeros(SHAPE, np.int16)
            inside = slice(brain[0].start + 8, brain[0].stop)  # boxes grow to multiples of 8
            box = (inside, *brain[1:]) if m == "t1" and name.endswith("1") else brain
            volume[box] = rng.integers(1, 500, volume[box].shape)
            nib.save(nib.Nifti1Image(volume, np.eye(4)), root / name / f"{name}_{m}.nii.gz")
        label = np.zeros(SHAPE, np.uint8)
        label[18:20, tumour, tumour] = 2
        label[19, tumour.start, tumour.start] = 4
        nib.save(nib.Nifti1Image(label, np.eye(4)), root / name / f"{name}_seg.nii.gz")
    out = tmp_path_factory.mktemp("store")
    # By force: no head has a brain of 6 mm.
    assert not prepare(find_cases(root, BRATS), out, BRATS, force=True, progress=False).failed
    return Store.open(out)


def where(stored, patch):
    """Start of a patch in the stored case, found by looking for it."""
    size = np.array(patch.shape[1:])
    whole = stored.image.astype(np.float32)
    for start in np.ndindex(*(np.array(whole.shape[1:]) - size + 1)):
        box = tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))
        if np.array_equal(whole[(slice(None), *box)], patch):
            return start
    raise AssertionError("no such patch")


def test_a_patch_is_a_piece_of_the_stored_case(store):
    dataset = PatchDataset(store, store.cases[:1], (6, 7, 8), seed=1)
    stored = store.read(store.cases[0])
    starts = Counter()
    for i in range(30):
        sample = dataset[0, i]
        start = where(stored, sample["image"].numpy())
        box = tuple(slice(s, s + n) for s, n in zip(start, (6, 7, 8), strict=True))
        assert np.array_equal(sample["label"].numpy(), stored.label[box])
        starts[start] += 1
    assert len(starts) > 25
    assert sample["image"].dtype == torch.float32 and sample["label"].dtype == torch.int64
    assert sample["case_id"] == "BraTS2021_00001" and sample["acquired"].all()


def test_positions_reach_both_borders(store):
    stored = store.read(store.cases[0])
    shape = np.array(stored.image.shape[1:])
    dataset = PatchDataset(store, store.cases[:1], tuple(shape - 2))
    starts = np.array([where(stored, dataset[0, i]["image"].numpy()) for i in range(60)])
    for axis in range(3):
        assert set(starts[:, axis]) == {0, 1, 2}


def test_a_sample_is_a_function_of_seed_epoch_and_index(store):
    dataset = PatchDataset(store, store.cases, (8, 8, 8), seed=4, foreground=0.5)
    again = pickle.loads(pickle.dumps(dataset))
    for at in ((0, 5), (3, 5), (0, 1)):
        one, two = dataset[at], again[at]
        assert torch.equal(one["image"], two["image"]) and one["key"] == two["key"]
    assert dataset[0, 5]["key"] != dataset[1, 5]["key"]
    other = PatchDataset(store, store.cases, (8, 8, 8), seed=5, foreground=0.5)
    assert other[0, 5]["key"] != dataset[0, 5]["key"]
    assert [dataset[0, i]["case_id"][-1] for i in range(6)] == list("123123")


def test_foreground_patches_are_centred_on_every_class(store):
    dataset = PatchDataset(store, store.cases[:1], (5, 5, 5), foreground=1.0)
    centres = Counter(int(dataset[0, i]["label"][2, 2, 2]) for i in range(300))
    # One ET voxel and 71 ED voxels: classes are drawn first, so each has half of the patches.
    assert set(centres) == {2, 3}
    assert abs(centres[3] / 300 - 0.5) < 0.1


def test_centres_lie_in_all_of_a_large_tumour(store, monkeypatch):
    """More voxels than are remembered of a case: those that are lie all over it."""
    stored = store.read(store.cases[0])
    whole, shape = stored.image.astype(np.float32), stored.image.shape[1:]
    monkeypatch.setattr(type(stored), "label", np.full(shape, 2, np.uint8))
    dataset = PatchDataset(store, store.cases[:1], (1, 1, 1), foreground=1.0)
    found = [(whole == dataset[0, i]["image"].numpy()).all(0).argmax() for i in range(60)]
    places = np.stack(np.unravel_index(found, shape), 1)
    assert all(set(4 * places[:, a] // shape[a]) == {0, 1, 2, 3} for a in range(3))


def test_a_share_of_patches_is_centred_on_the_tumour(store):
    dataset = PatchDataset(store, store.cases[:1], (3, 3, 3), foreground=0.25)
    hits = sum(int(dataset[0, i]["label"][1, 1, 1]) > 0 for i in range(400))
    stored = store.read(store.cases[0])
    by_chance = (stored.label > 0).mean()
    assert abs(hits / 400 - (0.25 + 0.75 * by_chance)) < 0.07


def test_small_volumes_lie_in_the_middle_of_zeros(store):
    stored = store.read(store.cases[2])
    shape = np.array(stored.image.shape[1:])
    size = tuple(int(n) for n in shape + np.array([5, 4, 8]))
    sample = PatchDataset(store, store.cases[2:], size, foreground=0.5)[0, 0]
    before = [(n - s) - (n - s) // 2 for n, s in zip(size, shape, strict=True)]
    box = tuple(slice(b, b + n) for b, n in zip(before, shape, strict=True))
    assert np.array_equal(sample["image"][(slice(None), *box)].numpy(), stored.image.astype("f4"))
    assert np.array_equal(sample["label"][box].numpy(), stored.label)
    assert sample["image"].count_nonzero() == np.count_nonzero(stored.image)
    assert sample["label"].count_nonzero() == np.count_nonzero(stored.label)


def test_one_axis_may_be_too_small_alone(store):
    stored = store.read(store.cases[2])
    d = stored.image.shape[1]
    sample = PatchDataset(store, store.cases[2:], (d + 3, 4, 4))[0, 0]
    inner = sample["image"][:, 2 : 2 + d].numpy()
    start = where(stored, inner)
    assert start[0] == 0
    assert not sample["image"][:, :2].any() and not sample["image"][:, 2 + d :].any()


def test_missing_and_withheld_modalities_are_zero(store):
    second = store.cases[1]
    sample = PatchDataset(store, [second], (8, 8, 8))[0, 0]
    assert tuple(sample["acquired"].tolist()) == ACQUIRED
    assert not sample["image"][1].any() and sample["image"][0].any()
    allowed = {second: (False, False, True, False)}
    narrowed = PatchDataset(store, [second], (8, 8, 8), allowed=allowed)[0, 0]
    assert narrowed["acquired"].tolist() == [False, False, True, False]
    assert not narrowed["image"][[0, 1, 3]].any() and narrowed["image"][2].any()
    item = CaseDataset(store, [second], allowed=allowed)[0]
    assert not item["image"][[0, 1, 3]].any() and item["image"][2].any()


def test_withheld_modalities_do_not_widen_the_volume(store):
    name = store.cases[0]
    stored = store.read(name)
    inner = stored.geometry.box(["t1"]).relative_to(stored.geometry.box())
    assert inner.lo == (8, 0, 0)
    dataset = PatchDataset(store, [name], (8, 8, 8), allowed={name: (False, False, True, False)})
    for i in range(20):
        start = np.array(dataset._start(stored, dataset.allowed[name], i))
        assert (start >= inner.lo).all() and (start + 8 <= inner.hi).all()


def test_an_item_of_a_case_is_what_is_stored(store):
    dataset = CaseDataset(store, store.cases, seed=2)
    item = dataset[1]
    stored = store.read(store.cases[1])
    assert np.array_equal(item["image"].numpy(), stored.image.astype(np.float32))
    assert np.array_equal(item["label"].numpy(), stored.label)
    assert item["label"].dtype == torch.int64 and item["stored"].case_id == item["case_id"]
    # The key belongs to the case, whatever else is tested.
    assert item["key"] == CaseDataset(store, store.cases[1:2], seed=2)[0]["key"]
    assert item["key"] != CaseDataset(store, store.cases[1:2], seed=3)[0]["key"]


def test_a_batch_stacks_its_patches(store):
    dataset = PatchDataset(store, store.cases, (8, 8, 8))
    batch = default_collate([dataset[0, 0], dataset[0, 1]])
    assert batch["image"].shape == (2, 4, 8, 8, 8) and batch["label"].shape == (2, 8, 8, 8)
    assert batch["case_id"] == list(store.cases[:2])
    assert batch["acquired"].shape == (2, 4) and batch["key"].dtype == torch.int64
    assert "present" not in batch


class Brighten(PatchTransform):
    def __init__(self, by: float = 1.0) -> None:
        self.by = by

    def __call__(self, image, label, key):
        return image + self.by, label


def test_transform_cannot_fill_absent_modalities(store):
    plain = PatchDataset(store, store.cases[1:2], (8, 8, 8))[0, 0]
    made = PatchDataset(store, store.cases[1:2], (8, 8, 8), transform=Brighten(2.0))[0, 0]
    assert torch.equal(made["image"][[0, 2, 3]], plain["image"][[0, 2, 3]] + 2)
    assert not made["image"][1].any()
