import zipfile

import numpy as np
import pytest

from pmixseg.data.formats.colours import class_colours
from pmixseg.errors import InputError
from pmixseg.evaluation.records.examples import Example, examples_of
from pmixseg.evaluation.report.pictures import (
    case_figure,
    disagreement,
    labelled,
    packed,
    panels,
    shown_combinations,
    upright,
    viewer_case,
)
from pmixseg.task import BRATS

ONE, BOTH = ("flair",), ("flair", "t1")


def example(shape=(20, 12, 6), case="a1", truth=True, max_side=10):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, *shape)).astype(np.float32)
    image[:, :3] = 0
    label = np.zeros(shape, np.uint8)
    label[5:15, 4:8, 3:] = 2
    label[8:12, 5:7, 4] = 3
    label[4, 4, 4] = 2
    predictions = {ONE: np.zeros_like(label), BOTH: label}
    return Example.from_volumes(
        case, BOTH, image, label if truth else None, predictions, (1, 1, 2), max_side
    )


def test_a_file_gives_back_what_was_kept(tmp_path):
    before = example()
    path = before.save(tmp_path)
    assert path == tmp_path / "slices" / "a1.npz"
    assert examples_of(tmp_path) == {"a1": path}
    after = Example.load(path)
    for name, value in vars(before).items():
        other = getattr(after, name)
        same = np.array_equal(value, other) if isinstance(value, np.ndarray) else value == other
        assert same, name
    unlabelled = example(truth=False)
    assert Example.load(unlabelled.save(tmp_path)).truth is None


def test_shrinking_keeps_size_in_mm_and_aligns_labels_with_image():
    picture = example()
    assert picture.image.shape == (2, 10, 6, 3)
    assert picture.spacing == (2, 2, 4)
    assert picture.truth.shape == picture.predictions.shape[1:] == (10, 6, 3)
    assert np.array_equal(picture.predictions[1], picture.truth)
    # A block of 2 voxels takes the label of its second: 5:15 covers 5, 7, ..., 13.
    assert np.flatnonzero(picture.truth.any((1, 2))).tolist() == [2, 3, 4, 5, 6]


def test_whole_factors_never_empty_an_axis():
    flat = example(shape=(20, 12, 5), max_side=3)
    assert flat.image.shape[1:] == (2, 1, 1)
    assert flat.spacing == (7, 7, 10)


def test_grey_values_use_their_range_and_background_stays_black():
    picture = example(max_side=100)
    assert (picture.image[:, :3] == 0).all()
    inside = picture.image[:, 3:]
    assert inside.min() == 1
    assert inside.max() == 255
    assert 100 < np.median(inside) < 155


def test_the_plane_with_most_tumour_is_cut():
    assert (example().slice_truth == 3).sum() == 8  # only plane 4 has any
    assert (example(truth=False).slice_predictions[1] == 3).sum() == 8


def test_pictures_are_radiological():
    plane = np.zeros((3, 2), np.uint8)
    plane[2, 1] = 9  # far right, anterior
    assert upright(plane).tolist() == [[9, 0, 0], [0, 0, 0]]


def test_disagreement_by_hand():
    grey = np.zeros((5, 1), np.uint8)
    truth = np.array([[0], [1], [0], [1], [1]], np.uint8)
    prediction = np.array([[0], [0], [1], [2], [1]], np.uint8)
    row = disagreement(grey, truth, prediction)[0][::-1]  # undo the left-right flip
    blank, missed, invented, confused, right = row
    assert blank.tolist() == right.tolist() == [0, 0, 0]
    assert missed.argmax() == 2
    assert invented.argmax() == 0
    assert confused.argmax() == 2
    assert missed.tolist() != confused.tolist()
    assert labelled(grey, truth)[0, 0].tolist() == labelled(grey, truth)[0, 1].tolist() != [0, 0, 0]


def test_the_panels_of_a_case_are_in_rows():
    rows = panels({"r": example()}, BRATS)
    assert [p.title for p in rows[0]] == ["FLAIR", "T1", "Truth"]
    assert [p.note for p in rows[1]] == ["from FLAIR + T1", "from FLAIR"]
    assert [p.title for p in rows[2]] == ["Error", "Error"]
    assert rows[0][0].data_uri.startswith("data:image/png;base64,iVBOR")
    without = panels({"r": example(truth=False), "s": example(truth=False)}, BRATS)
    assert [row[0].title for row in without] == ["FLAIR", "Prediction, r", "Prediction, s"]
    figure = case_figure({"r": example()}, BRATS)
    assert len(figure.axes[0].texts) == 3 + 2 + 2


def test_the_full_combination_and_singles_are_shown():
    every = BRATS.combinations()
    shown = shown_combinations(every, BRATS)
    assert shown == [BRATS.modalities, ("flair",), ("t1ce",), ("t1",), ("t2",)]


def test_what_the_viewer_gets_is_what_was_kept():
    import base64
    import gzip

    picture = example()
    data = viewer_case({"r": picture, "s": picture})
    volume = np.frombuffer(gzip.decompress(base64.b64decode(data["truth"])), np.uint8)
    assert np.array_equal(volume.reshape(data["shape"]), picture.truth)
    image = np.frombuffer(gzip.decompress(base64.b64decode(data["image"])), np.uint8)
    assert np.abs(image.astype(int) - picture.image.ravel()).max() <= 3
    assert [r["run"] for r in data["runs"]] == ["r", "s"]
    assert data["runs"][0]["combinations"] == ["flair", "flair+t1"]
    assert packed(picture.image) == packed(picture.image)
    assert len(class_colours(9)) == 9


def test_an_example_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "slices").write_text("in the way")
    with pytest.raises(
        InputError, match=r"a1\.npz cannot be written \(File exists\); correct the path"
    ):
        example().save(tmp_path)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match=r"a1\.npz cannot be written \(Not a directory\)"):
        example().save(tmp_path / "file" / "run")


def test_damaged_or_impossible_examples_are_named(tmp_path):
    label = np.zeros((4, 4, 4), np.uint8)
    image = np.zeros((2, 4, 4, 4), np.float32)
    with pytest.raises(InputError, match="case 'x'"):
        Example.from_volumes("x", BOTH, image, label, {}, (1, 1, 1))
    with pytest.raises(InputError, match="of the image's shape"):
        Example.from_volumes("x", BOTH, image, label[:2], {ONE: label}, (1, 1, 1))
    path = tmp_path / "bad.npz"
    path.write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(InputError, match=r"bad\.npz"):
        Example.load(path)
    with zipfile.ZipFile(path, "w") as archive:  # its header ends early
        archive.writestr("format.npy", b"\x93NUMPY\x01\x00\x06\x00{'a': ")
    with pytest.raises(InputError, match=r"bad\.npz: is not an example of a run"):
        Example.load(path)
    np.savez(path, format=np.array(2))
    with pytest.raises(InputError, match="format 2"):
        Example.load(path)
    empty = Example.from_volumes("x", BOTH, image, label, {ONE: label}, (1, 1, 1))
    assert not empty.image.any()
