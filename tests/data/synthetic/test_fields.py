import numpy as np
import pytest
from scipy.interpolate import BSpline

from medssl.data.synthetic.fields import _spline_basis, ramp, smooth_field


def test_ramp_is_the_share_of_a_voxel_on_the_inner_side():
    width = 2.0
    for distance in np.linspace(-2, 2, 17):
        points = distance + np.linspace(-width / 2, width / 2, 20_001)
        assert ramp(np.array([distance]), width)[0] == pytest.approx(np.mean(points < 0), abs=1e-3)


def test_the_basis_is_scipys_cubic_b_spline():
    basis = _spline_basis(11, 0.37)
    element = BSpline.basis_element(np.arange(5.0), extrapolate=False)
    for knot in range(basis.shape[1]):
        expected = np.nan_to_num(element(np.arange(11) * 0.37 - knot + 3))
        assert basis[:, knot] == pytest.approx(expected, abs=1e-12)


def test_smooth_fields_have_mean_0_and_deviation_1():
    rng = np.random.default_rng(0)
    fields = [smooth_field(rng, (8, 16, 16), (7.0, 2.0, 2.0), 9.0) for _ in range(200)]
    assert np.mean(fields) == pytest.approx(0, abs=0.03)
    assert np.std(fields) == pytest.approx(1, abs=0.03)


def test_the_length_of_a_field_is_in_mm_whatever_the_grid():
    """Neighbours 4 mm apart agree equally well along slices, rows and columns."""
    rng = np.random.default_rng(1)
    fields = [smooth_field(rng, (12, 24, 48), (4.0, 2.0, 1.0), 8.0) for _ in range(100)]
    stack = np.stack(fields)
    similar = [
        np.mean(stack[:, 1:] * stack[:, :-1]),
        np.mean(stack[:, :, 2:] * stack[:, :, :-2]),
        np.mean(stack[..., 4:] * stack[..., :-4]),
    ]
    assert similar == pytest.approx([np.mean(similar)] * 3, abs=0.03)
    assert 0.5 < np.mean(similar) < 0.95
