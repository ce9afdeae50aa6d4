import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import affine_transform

from pmixseg.data.resample import Turn, turn_patch


def patch(shape=(7, 9, 8), n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(n, *shape, generator=generator)
    return image, torch.randint(0, 4, shape, generator=generator)


def turned(image, label, turn, spacing=(1.0, 1.0, 1.0)):
    image, label = image.clone(), label.clone()
    turn_patch(image, label, turn, spacing)
    return image, label


turns = st.builds(
    Turn,
    axis=st.integers(0, 2),
    degrees=st.floats(-180, 180),
    zoom=st.floats(0.5, 2.0),
    flips=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)


@settings(max_examples=60)
@given(turn=turns, spacing=st.sampled_from([(1.0, 1.0, 1.0), (5.0, 1.0, 0.7)]))
def test_image_equals_one_trilinear_resampling(turn, spacing):
    image, label = patch()
    out, _ = turned(image, label, turn, spacing)
    matrix = turn.inverse(spacing).numpy()
    centre = (np.array(label.shape) - 1) / 2
    for m in range(len(image)):
        expected = affine_transform(
            # 'constant' in SciPy cuts off half-inside voxels; a border of zeros blends them.
            np.pad(image[m].double().numpy(), 1),
            matrix,
            offset=centre + 1 - matrix @ centre,
            output_shape=label.shape,
            order=1,
        )
        np.testing.assert_allclose(out[m].numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_image_equals_grid_sample(axis):
    image, label = patch((16, 16, 16), 4)
    turn = Turn(axis, 25.0, 1.2, (True, False, False))
    out, _ = turned(image, label, turn)
    # grid_sample counts axes from the last.
    theta = torch.cat([turn.inverse((1, 1, 1)).flip(0, 1).float(), torch.zeros(3, 1)], 1)
    grid = F.affine_grid(theta[None], [1, 4, 16, 16, 16], align_corners=True)
    expected = F.grid_sample(image[None], grid, align_corners=True)[0]
    torch.testing.assert_close(out, expected, atol=3e-5, rtol=0)


@settings(max_examples=60)
@given(turn=turns)
def test_label_is_the_nearest_voxel(turn):
    image, label = patch()
    out = turned(image, label, turn)[1].numpy()
    matrix, size = turn.inverse((1, 1, 1)).numpy(), np.array(label.shape)
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
    source = (grid - (size - 1) / 2) @ matrix.T + (size - 1) / 2
    # Ties may fall to either side.
    clear = (np.abs(source + 0.5 - np.round(source + 0.5)) > 1e-9).all(-1)
    nearest = np.floor(source + 0.5).astype(int)
    inside = ((nearest >= 0) & (nearest < size)).all(-1)
    if not turn.resamples:
        clear = np.ones_like(inside)
    expected = np.where(
        inside, label.numpy()[tuple(np.where(inside[..., None], nearest, 0).T)].T, 0
    )
    np.testing.assert_array_equal(out[clear], expected[clear])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_quarter_turns_are_exact_and_four_are_none(axis):
    image, label = patch((6, 6, 6))
    quarter = Turn(axis, 90.0)
    once = turned(image, label, quarter)
    first, second = quarter.plane
    torch.testing.assert_close(once[0], image.rot90(1, (first + 1, second + 1)), atol=1e-5, rtol=0)
    assert torch.equal(once[1], label.rot90(1, (first, second)))
    image4, label4 = once
    for _ in range(3):
        image4, label4 = turned(image4, label4, quarter)
    torch.testing.assert_close(image4, image, atol=1e-5, rtol=0)
    assert torch.equal(label4, label)


def test_flips_alone_are_exact():
    image, label = patch()
    out, out_label = turned(image, label, Turn(flips=(True, False, True)))
    assert torch.equal(out, image.flip(1, 3))
    assert torch.equal(out_label, label.flip(0, 2))


def test_zoom_grows_the_content():
    image = torch.zeros(1, 21, 21, 21)
    image[:, 8:13, 8:13, 8:13] = 1
    label = (image[0] > 0).long()
    out, out_label = turned(image, label, Turn(zoom=2.0))
    assert label.sum() == 5**3
    # Voxels at x with |x / 2| <= 2.5 read the cube; 2.5 rounds up on one side of the centre.
    assert out_label.sum() == 10**3
    assert out.sum() == pytest.approx(5**3 * 8, rel=0.01)
    untouched, same = turned(image, label, Turn())
    assert torch.equal(untouched, image) and torch.equal(same, label)


def test_turning_is_rigid_in_mm():
    # A sphere in mm on voxels of 4 x 1 x 2 mm stays where it is.
    spacing = (4.0, 1.0, 2.0)
    axes = [(torch.arange(n) - (n - 1) / 2) * s for n, s in zip((11, 44, 22), spacing, strict=True)]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    distance = (z**2 + y**2 + x**2).sqrt()
    image = (-(distance**2) / 60).exp()[None]
    label = (distance < 14).long()
    for axis in range(3):
        out, out_label = turned(image, label, Turn(axis, 30.0), spacing)
        overlap = 2 * (label * out_label).sum() / (label.sum() + out_label.sum())
        assert overlap > 0.93
        assert (out - image).abs().max() < 0.09
    skewed = turned(image, label, Turn(2, 30.0))[1]
    assert 2 * (label * skewed).sum() / (label.sum() + skewed.sum()) < 0.9


def test_views_of_a_batch_are_changed_in_place():
    image, label = patch((8, 8, 8))
    batch, labels = torch.stack([image, image]), torch.stack([label, label])
    turn_patch(batch[1], labels[1], Turn(1, 10.0), (1.0, 1.0, 1.0))
    assert torch.equal(batch[0], image)
    assert torch.equal(batch[1], turned(image, label, Turn(1, 10.0))[0])
    assert torch.equal(labels[1], turned(image, label, Turn(1, 10.0))[1])
