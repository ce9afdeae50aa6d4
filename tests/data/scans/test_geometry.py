import json

import nibabel as nib
import numpy as np
import pytest
import torchio as tio
from hypothesis import given
from hypothesis import strategies as st

from pmixseg.data.scans.boxes import Box
from pmixseg.data.scans.geometry import Geometry
from pmixseg.errors import InputError

LPS = np.array([[-1.0, 0, 0, 10], [0, -1, 0, 239], [0, 0, 1, -5], [0, 0, 0, 1]])
PERMUTED = np.array([[0, 0, -2.0, 7], [1.5, 0, 0, 1], [0, -1, 0, 2], [0, 0, 0, 1]])

AFFINES = st.builds(
    lambda order, signs, zooms: nib.affines.from_matvec(
        np.eye(3)[list(order)] * np.array(signs) * np.array(zooms), [3, -4, 5]
    ),
    st.permutations([0, 1, 2]),
    st.tuples(*[st.sampled_from([-1, 1])] * 3),
    st.tuples(*[st.sampled_from([0.8, 1.0, 1.5, 3.0])] * 3),
)
SHAPES = st.tuples(*[st.integers(2, 9)] * 3)


def test_boxes_by_hand():
    box = Box((3, 9, 0), (10, 16, 5))
    assert box.shape == (7, 7, 5)
    assert box.grow(8, (12, 40, 5)) == Box((0, 8, 0), (12, 16, 5))
    assert Box((4, 9, 1), (5, 10, 2)).relative_to(box) == Box((1, 0, 1), (2, 1, 2))
    assert box.contains(Box((3, 9, 0), (4, 10, 5))) and not box.contains(Box((2, 9, 0), (4, 10, 5)))
    assert Box.from_dict(json.loads(json.dumps(box.to_dict()))) == box


@given(AFFINES, SHAPES)
def test_canonical_view_is_nibabels_closest_canonical(affine, shape):
    array = np.arange(np.prod(shape)).reshape(shape)
    canonical = nib.as_closest_canonical(nib.Nifti1Image(array.astype(np.int32), affine))
    geometry = Geometry.of(shape, affine)
    np.testing.assert_array_equal(geometry.canonical_view(array), canonical.get_fdata())
    np.testing.assert_allclose(geometry.canonical_affine, canonical.affine, atol=1e-9)
    np.testing.assert_allclose(geometry.source_spacing, canonical.header.get_zooms(), rtol=1e-5)
    zooms = nib.affines.voxel_sizes(affine)
    np.testing.assert_allclose(geometry.source_zooms, zooms, rtol=1e-12)


@given(AFFINES, SHAPES, st.data())
def test_a_box_goes_back_where_it_came_from(affine, shape, data):
    source = np.arange(1, np.prod(shape) + 1).reshape(shape)
    geometry = Geometry.of(shape, affine)
    canonical = geometry.canonical_view(source)
    lo = [data.draw(st.integers(0, n - 1)) for n in canonical.shape]
    hi = [data.draw(st.integers(a + 1, n)) for a, n in zip(lo, canonical.shape, strict=True)]
    box = Box(tuple(lo), tuple(hi))
    back = geometry.to_source(canonical[box.slices], box, order=0)
    assert back.flags.c_contiguous
    inside = np.isin(source, canonical[box.slices])
    np.testing.assert_array_equal(back, np.where(inside, source, 0))
    # canonical_box is the same map for boxes
    where = np.argwhere(inside)
    tight = Box(tuple(where.min(0)), tuple(where.max(0) + 1))
    assert geometry.canonical_box(tight) == box


def test_a_trace_of_shear_is_that_of_a_registration():
    affine = np.diag([1.0, 1, 2, 1])
    affine[0, 2] = 0.03  # cosine 0.015
    assert Geometry.of((4, 5, 6), affine).source_spacing == pytest.approx((1, 1, 2), rel=2e-4)
    affine[0, 2] = -0.05
    with pytest.raises(ValueError, match=r"at 88\.6 degrees to each other"):
        Geometry.of((4, 5, 6), affine)


def test_leading_axes_are_kept():
    geometry = Geometry.of((4, 5, 6), PERMUTED)
    volume = np.random.default_rng(0).random((2, 3, *geometry.canonical_shape)).astype(np.float32)
    back = geometry.to_source(volume, Box.whole(geometry.canonical_shape), order=1)
    assert back.shape == (2, 3, 4, 5, 6)
    np.testing.assert_array_equal(geometry.canonical_view(back), volume)


def test_the_grid_shares_the_lowest_corner_and_covers_the_volume():
    geometry = Geometry.of((240, 240, 155), LPS, (2.0, 2.0, 2.0))
    assert geometry.grid_shape == (120, 120, 78) and geometry.resampled
    # averages of eight neighbours: voxel i of the grid lies between source voxels 2i and 2i + 1
    source = np.random.default_rng(0).random((6, 4, 2)).astype(np.float32)
    made = Geometry.of((6, 4, 2), np.eye(4), (2.0, 2.0, 2.0)).to_grid(source, order=1)
    expected = source.reshape(3, 2, 2, 2, 1, 2).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(made, expected, rtol=1e-6)


def test_header_noise_neither_resamples_nor_adds_a_voxel():
    noisy = np.diag([0.99999994, 1.0, 1.00001, 1.0])
    geometry = Geometry.of((240, 240, 155), noisy, (1.0, 1.0, 1.0))
    assert not geometry.resampled and geometry.grid_shape == (240, 240, 155)
    assert Geometry.of((100, 100, 100), noisy, (2.0, 2.0, 2.0)).grid_shape == (50, 50, 50)


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (1.5, 0.7, 3.0), (0.5, 1.0, 0.9)])
def test_resampling_agrees_with_torchio_inside(spacing):
    shape = (24, 20, 16)
    axes = np.meshgrid(*(np.linspace(0, 3, n) for n in shape), indexing="ij")
    source = np.sin(axes[0] + 0.5 * axes[1] - axes[2]).astype(np.float32)
    geometry = Geometry.of(shape, np.eye(4), spacing)
    made = geometry.to_grid(source, order=1)
    # the same lattice for torchio: voxel size and, from the shared corner, the first centre
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [(s - 1) / 2 for s in spacing]
    target = tio.ScalarImage(tensor=np.zeros((1, *made.shape), np.float32), affine=affine)
    image = tio.ScalarImage(tensor=source[None], affine=np.eye(4))
    expected = tio.Resample(target, image_interpolation="linear")(image).numpy()[0]
    inner = tuple(slice(3, -3) for _ in range(3))
    np.testing.assert_allclose(made[inner], expected[inner], atol=1e-4)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (1.5, 0.7, 3.0), (1.1, 2.3, 0.6)])
def test_a_box_is_resampled_as_the_whole_grid_would_be(order, spacing):
    geometry = Geometry.of((40, 37, 30), LPS, spacing)
    box = Box((8, 4, 3), (12, 9, 8))
    random = np.random.default_rng(1)
    full = np.zeros(geometry.grid_shape, np.float32 if order else np.uint8)
    full[box.slices] = random.integers(1, 4, box.shape)
    whole = geometry.to_source(full, Box.whole(geometry.grid_shape), order)
    part = geometry.to_source(full[box.slices], box, order)
    assert part.any()
    np.testing.assert_allclose(part, whole, atol=1e-5)


def test_labels_survive_down_and_up_where_they_are_large():
    geometry = Geometry.of((40, 40, 40), LPS, (2.0, 2.0, 2.0))
    source = np.zeros((40, 40, 40), np.uint8)
    source[10:30, 8:28, 12:32] = 3
    small = geometry.to_grid(geometry.canonical_view(source), order=0)
    assert small.dtype == np.uint8
    back = geometry.to_source(small, Box.whole(geometry.grid_shape), order=0)
    np.testing.assert_array_equal(back, source)


def test_the_box_of_a_combination_holds_all_its_boxes():
    boxes = {"flair": Box((0, 0, 0), (8, 8, 8)), "t1": Box((8, 0, 0), (16, 8, 24))}
    geometry = Geometry.of((32, 32, 32), np.eye(4), boxes=boxes)
    assert geometry.box(["t1"]) == boxes["t1"]
    assert geometry.box() == Box((0, 0, 0), (16, 8, 24))
    with pytest.raises(InputError, match="no box for \\['t2'\\]"):
        geometry.box(["t1", "t2"])
    with pytest.raises(InputError, match="empty combination"):
        geometry.box([])
    assert Geometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry


def test_programming_errors_are_told():
    geometry = Geometry.of((8, 8, 8), np.eye(4))
    with pytest.raises(ValueError, match="its box is"):
        geometry.to_source(np.zeros((4, 4, 4)), Box.whole((8, 8, 8)), 0)
    with pytest.raises(ValueError, match="singular"):
        Geometry.of((8, 8, 8), np.diag([1.0, 0.0, 1.0, 1.0]))
