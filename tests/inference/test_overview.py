"""The picture of a result: planes through the tumour, the right way up, contours in its colours."""

import numpy as np
import pytest
from matplotlib.image import imread

from pmixseg.cli import main
from pmixseg.data.formats.colours import class_colours
from pmixseg.inference.outputs import Outputs
from pmixseg.inference.overview import overview, scans_on_grid
from pmixseg.inference.segment import segment_files
from pmixseg.task import BRATS

AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])
LPS = np.diag([-1.0, -1.0, 2.0, 1.0])


@pytest.fixture
def head():
    """A bright corner: right, front, top; a tumour of NCR within ED."""
    scan = np.full((12, 14, 10), 50, np.float32)
    scan[9:, 11:, 7:] = 100
    classes = np.zeros(scan.shape, np.uint8)
    classes[2:7, 3:8, 4:8] = 2
    classes[3:6, 4:7, 5:7] = 1
    return scan, classes


def planes(figure):
    return {a.get_title("left"): np.asarray(a.images[0].get_array()) for a in figure.axes}


@pytest.mark.parametrize("affine", [AFFINE, LPS])
def test_planes_are_upright_whatever_the_axes_of_the_file(head, affine):
    scan, classes = head
    if affine[0, 0] < 0:
        scan, classes = scan[::-1, ::-1], classes[::-1, ::-1]
    figure = overview({"t1": scan}, classes, affine, BRATS, name="x", volumes={})
    shown = planes(figure)
    assert list(shown) == ["T1, sagittal", "T1, coronal", "T1, axial"]
    assert shown["T1, axial"].shape == (14, 12) and shown["T1, coronal"].shape == (10, 12)
    assert shown["T1, sagittal"].shape == (10, 14)
    # no plane through the tumour meets the bright corner; move the tumour there
    corner = np.zeros_like(classes)
    corner[np.unravel_index(scan.argmax(), scan.shape)] = 3
    shown = planes(overview({"t1": scan}, corner, affine, BRATS, name="x", volumes={}))
    for plane in shown.values():  # top is up, front is up or left, right is on the left
        assert plane[0, 0] == 100 and plane[-1, -1] == 50


def test_an_overview_shows_contours_colours_and_volumes(head):
    scan, classes = head
    volumes = {"WT": 12.34, "TC": 5.0, "ET": 0.0}
    figure = overview({"t1": scan, "t2": scan}, classes, AFFINE, BRATS, name="x7", volumes=volumes)
    assert len(figure.axes) == 6
    ncr, ed, _ = class_colours(3)
    for axes in figure.axes:
        drawn = {tuple(np.round(c.get_edgecolor()[0][:3] * 255)) for c in axes.collections}
        assert drawn == {tuple(bytes.fromhex(colour[1:])) for colour in (ncr, ed)}
    said = " ".join(text.get_text() for text in figure.texts)
    assert "x7" in said and "WT 12.3 ml   TC 5.0 ml   ET 0.0 ml" in said
    assert "Research use only" in said
    # voxels are twice as high as wide
    assert figure.axes[1].get_aspect() == 2 and figure.axes[2].get_aspect() == 1


def test_nothing_segmented_is_drawn_through_the_head(head):
    scan, classes = np.zeros_like(head[0]), np.zeros_like(head[1])
    scan[4:9, 2:5, 6:9] = 7
    scan[6, 3, 7] = 9
    shown = planes(overview({"t1": scan}, classes, AFFINE, BRATS, name="x", volumes={}))
    assert all(plane.max() == 9 for plane in shown.values())


def test_only_scans_on_the_grid_of_the_result(model, cropped_root):
    files = {p.name.split("_")[-1][:-7]: p for p in sorted(cropped_root.rglob("*.nii.gz"))[:5]}
    files.pop("seg")
    result = model.segment(files)
    there = scans_on_grid(files, result.classes.shape, result.affine, "case 'x'")
    assert set(there) == set(files)
    moved = result.affine + np.eye(4)[:, [3, 0, 1, 2]]
    assert not scans_on_grid(files, result.classes.shape, moved, "case 'x'")


def test_segment_draws_a_picture_beside_the_label_map(checkpoint, cropped_root, tmp_path, capsys):
    arguments = ["segment", str(checkpoint), str(cropped_root), "-o", str(tmp_path), "--png"]
    assert main([*arguments, "--part=1/2"]) == 0
    (picture,) = tmp_path.glob("*_seg.png")
    assert imread(picture).shape[2] in (3, 4) and imread(picture).std() > 0.05
    name = picture.name.removesuffix("_seg.png")
    endings = (".ctbl", "_itksnap.txt", ".nii.gz", ".json", ".png")
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}_seg{end}" for end in endings}


def test_a_picture_can_be_asked_for_in_python(model, cropped_root, tmp_path):
    scan = next(cropped_root.rglob("*_t1.nii.gz"))
    result = segment_files(model, {"t1": scan}, Outputs(tmp_path, png=True), name="me")
    assert result.files["png"] == tmp_path / "me_seg.png"
    assert imread(result.files["png"]).size
