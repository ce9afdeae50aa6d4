"""What can be seen where: the properties that let the phantom tell methods apart."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from pmixseg.data.phantom.anatomy import (
    Deformation,
    Grid,
    refine,
    smooth_noise,
    stream,
)
from pmixseg.data.phantom.cohort import PhantomSettings, make_case
from pmixseg.data.phantom.contrast import Scanner
from pmixseg.data.phantom.tumour import GROWTH_GRID, Focus, displacement, enhancement, grow

SETTINGS = PhantomSettings(spacing=3.0)
NCR, ED, ET = 1, 2, 3


@pytest.fixture(scope="module")
def cases():
    return [make_case(11, index, SETTINGS) for index in range(12)]


@pytest.fixture(scope="module")
def white_matter(cases):
    """Per case: voxels of white matter well away from the tumour."""
    masks = []
    for index, case in enumerate(cases):
        wm = Deformation(11, index).tissues(SETTINGS.grid).wm > 0.9
        masks.append(wm & ~ndimage.binary_dilation(case.label > 0, iterations=3))
    return masks


def _z(values):
    inside = values[values > 0].astype(float)
    return (values - inside.mean()) / inside.std()


def _difference(cases, modality, one, other):
    """Difference of mean z-scores between two masks, per case that has 30 voxels of both."""
    differences = []
    for case, first, second in zip(cases, one, other, strict=True):
        if min(first.sum(), second.sum()) >= 30:
            z = _z(case.images[modality])
            differences.append(z[first].mean() - z[second].mean())
    assert len(differences) >= 5
    return np.array(differences)


def _labelled(cases, value):
    return [case.label == value for case in cases]


def test_oedema_shows_in_flair_and_t2_and_little_in_t1(cases, white_matter):
    oedema = _labelled(cases, ED)
    seen = {
        m: np.median(_difference(cases, m, oedema, white_matter))
        for m in ("flair", "t1ce", "t1", "t2")
    }
    assert seen["flair"] > 1.5
    assert 0.5 < seen["t2"] < seen["flair"]
    assert -1.5 < seen["t1"] < -0.3
    assert -1.5 < seen["t1ce"] < -0.2


def test_the_core_shows_in_t2_and_is_dark_in_t1(cases, white_matter):
    core = _labelled(cases, NCR)
    assert np.median(_difference(cases, "t2", core, _labelled(cases, ED))) > 0.2
    assert np.median(_difference(cases, "t2", core, white_matter)) > 0.8
    for modality in ("t1", "t1ce"):
        assert np.median(_difference(cases, modality, core, white_matter)) < -0.5


def test_enhancement_shows_in_t1ce_only(cases):
    enhancing, necrotic = _labelled(cases, ET), _labelled(cases, NCR)
    assert np.median(_difference(cases, "t1ce", enhancing, necrotic)) > 2
    for modality in ("flair", "t1", "t2"):
        contrast = _difference(cases, modality, enhancing, necrotic)
        assert abs(contrast.mean()) < 3 * contrast.std() / np.sqrt(len(contrast)) + 0.1


def test_only_the_enhancing_contrast_depends_on_enhancement():
    # Take the enhancement away: every voxel of the other modalities stays.
    for index in range(3):
        with_et = make_case(11, index, replace(SETTINGS, not_enhancing=0.0))
        without = make_case(11, index, replace(SETTINGS, not_enhancing=1.0))
        assert np.array_equal(with_et.label > 0, without.label > 0)
        assert np.array_equal(with_et.label == ED, without.label == ED)
        for modality in ("flair", "t1", "t2"):
            assert np.array_equal(with_et.images[modality], without.images[modality])
        if (with_et.label == ET).any():
            assert not np.array_equal(with_et.images["t1ce"], without.images["t1ce"])


def test_enhancement_is_uncorrelated_with_intensity_in_flair_and_t2(cases):
    for modality in ("flair", "t2"):
        correlations = []
        for case in cases:
            core = (case.label == NCR) | (case.label == ET)
            enhancing = (case.label == ET)[core]
            if 0.05 < enhancing.mean() < 0.95:
                values = case.images[modality][core]
                correlations.append(np.corrcoef(values, enhancing)[0, 1])
        assert len(correlations) >= 5
        # The core's border is the paler one, and rims hug it, so single cases correlate a little.
        assert abs(np.mean(correlations)) < 0.15


def test_the_enhancing_share_spans_almost_none_to_all():
    shares = []
    for index in range(200):  # one core in seven may have any share
        # Only the level fields: what they become in a scan needs no checking here.
        core = np.zeros(GROWTH_GRID.shape, dtype=np.float32) - 5
        core[20:30, 20:30, 20:30] = 5
        field = enhancement(stream(0, index, "t"), core)
        shares.append((field[core > 0] > 0).mean())
    assert min(shares) < 0.05 and max(shares) > 0.98
    # Every fifth of the range is drawn; without T1ce a network still does best to guess "all".
    assert np.all(np.histogram(shares, bins=5, range=(0, 1))[0] >= 3)
    assert 0.7 < np.mean(shares) < 0.85


def test_regions_are_nested(cases):
    surrounded, deeper = [], []
    for case in cases:
        core = (case.label == NCR) | (case.label == ET)
        brain = case.images["t1"] > 0
        shell = ndimage.binary_dilation(core) & ~core & brain
        surrounded.append((case.label[shell] == ED).mean())
        assert surrounded[-1] > 0.15
        if min((case.label == c).sum() for c in (NCR, ET)) > 50:
            depth = ndimage.distance_transform_edt(core)
            deeper.append(depth[case.label == NCR].mean() > depth[case.label == ET].mean())
    # Oedema surrounds the core except where grey matter or CSF meets it, and enhancement is the
    # outer part of the core except where it is patchy.
    assert np.mean(surrounded) > 0.55
    assert np.mean(deeper) > 0.7


def test_oedema_follows_white_matter():
    shares, expected = [], []
    for index in range(4):
        anatomy = Deformation(5, index)
        tumour = grow(5, index, anatomy, high_grade=True, foci=1, enhancing=True)
        tissues = anatomy.tissues(GROWTH_GRID, displacement(tumour.foci, GROWTH_GRID))
        oedema = (tumour.oedema > 0) & (tumour.core <= 0)
        reach = ndimage.distance_transform_edt(tumour.core <= 0)
        ring = (tumour.core <= 0) & tissues.brain & (reach <= reach[oedema].max())
        shares.append(tissues.wm[oedema].mean())
        expected.append(tissues.wm[ring].mean())
    assert np.mean(shares) > np.mean(expected) + 0.15


def test_mass_effect_moves_tissue_outwards_and_fades():
    grid = Grid((41, 41, 41), 3.0)
    centre = tuple(float(a[20]) for a in grid.axes())
    moved = displacement((Focus(centre, 20.0, 15.0),), grid)
    along = moved[0, 20:, 20, 20]
    assert along[0] == pytest.approx(0, abs=1e-3)
    # At 30 mm: 30 - (30³ - 15³)^(1/3) = 30 - 23625^(1/3) = 1.306 mm.
    assert along[10] == pytest.approx(1.306, abs=0.01)
    assert moved[0, 10, 20, 20] == pytest.approx(-1.306, abs=0.01)
    assert np.all(np.diff(along[6:]) < 0)
    assert np.allclose(moved[1, 20:, 20, 20], 0, atol=1e-4)


def test_several_foci_make_several_cores():
    counts = []
    for index in range(4):
        tumour = grow(6, index, Deformation(6, index), high_grade=True, foci=3, enhancing=True)
        assert len(tumour.foci) == 3
        counts.append(ndimage.label(tumour.core > 0)[1])
    assert np.mean(counts) > 1.5


def test_smooth_noise_has_unit_variance_everywhere_and_no_memory_of_the_grid():
    fields = np.stack(
        [smooth_noise(stream(0, i, "t"), Grid((10, 12, 8), 6.0), 30.0) for i in range(200)]
    )
    assert np.allclose(fields.std(axis=0), 1, atol=0.25)
    assert abs(fields.mean()) < 0.05
    coarse = smooth_noise(stream(0, 0, "t"), Grid((11, 11, 11), 6.0), 30.0)
    fine = smooth_noise(stream(0, 0, "t"), Grid((21, 21, 21), 3.0), 30.0)
    assert np.allclose(fine[::2, ::2, ::2], coarse, atol=1e-5)


def test_refine_keeps_a_smooth_field():
    source, target = Grid((21, 23, 25), 3.0), Grid((40, 42, 44), 1.0)

    def wave(grid):
        x, y, z = np.meshgrid(*grid.axes(), indexing="ij")
        return np.sin(x / 9) + np.cos(y / 11) * np.sin(z / 8)

    refined = refine(wave(source).astype(np.float32), source, target)
    assert np.allclose(refined, wave(target), atol=0.01)
    same = wave(source).astype(np.float32)
    assert refine(same, source, source) is same


def _noise_free(**changes):
    quiet = {"noise": 0.0, "bias": 0.0, "thick_slices": 0.0}
    return replace(SETTINGS, scanner=Scanner(**{**quiet, **changes}))


def _residual_correlation(settings):
    """Correlation of T2 and FLAIR signal within oedema."""
    correlations = []
    for index in range(5):
        case = make_case(13, index, settings)
        # Deep oedema only: partial volume at borders correlates for another reason.
        inside = ndimage.binary_erosion(case.label == ED)
        if inside.sum() > 50:
            correlations.append(
                np.corrcoef(case.images["flair"][inside], case.images["t2"][inside])[0, 1]
            )
    return np.mean(correlations)


def test_dependence_makes_modalities_agree():
    low = _residual_correlation(_noise_free(dependence=0.0, private_signal=0.0))
    high = _residual_correlation(_noise_free(dependence=1.0, private_signal=0.0))
    assert high > low + 0.3


def test_private_signal_is_seen_in_one_modality_only():
    def agreement(share):
        settings = _noise_free(private_signal=share, texture=0.0, disagreement=0.0)
        return _residual_correlation(settings)

    assert agreement(1.0) < agreement(0.0) - 0.1


def test_thick_slices_blur_along_the_third_axis_only():
    thin, thick = (
        make_case(
            14,
            0,
            replace(PhantomSettings(3.0, shape=(50, 64, 52)), scanner=Scanner(thick_slices=share)),
        )
        for share in (0.0, 1.0)
    )

    def roughness(case, axis):
        z = _z(case.images["t1"])
        brain = ndimage.binary_erosion(case.images["t1"] > 0, iterations=4)
        return np.abs(np.diff(z, axis=axis, append=0))[brain].mean()

    assert roughness(thick, 2) < 0.8 * roughness(thin, 2)
    assert roughness(thick, 0) > 0.5 * roughness(thin, 0)
