"""Laws of growth against numpy's and scipy's fits, and against laws that were planted."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import curve_fit
from scipy.stats import binom, t

from medssl.probes.scaling import Law, ScalingReport, scaling

SIZES = [50 * 2**step for step in range(7)]
DOUBLE = 2 * SIZES[-1]
LOGARITHMIC = {"a": 0.5, "b": 0.1}
POWER = {"a": 0.9, "b": 1.0, "c": 0.5}


def truth(law: dict[str, float], size):
    if "c" in law:
        return law["a"] - law["b"] * size ** -law["c"]
    return law["a"] + law["b"] * np.log10(size)


def measured(law: dict[str, float], noise: float, seed: int, draws: int = 5):
    """Sizes, and values of the law with noise."""
    sizes = [size for size in SIZES for _ in range(draws)]
    values = torch.from_numpy(truth(law, np.array(sizes, dtype=float)))
    generator = torch.Generator().manual_seed(seed)
    return sizes, values + noise * torch.randn(len(sizes), generator=generator)


def by_name(report: ScalingReport) -> dict[str, Law]:
    return {law.name: law for law in report.laws}


def curved(size, a, b, c):
    return a - b * size**-c


def test_the_logarithmic_law_is_numpys_straight_line():
    sizes, values = measured(LOGARITHMIC, 0.02, seed=0)
    found = by_name(scaling(sizes, values, seed=0, repeats=10))["logarithmic"].parameters
    b, a = np.polyfit(np.log10(sizes), values.numpy(), 1)
    assert list(found) == ["a", "b"]
    assert found["a"].value == pytest.approx(a)
    assert found["b"].value == pytest.approx(b)


def test_the_power_law_is_scipys_fit():
    sizes, values = measured(POWER, 0.01, seed=0)
    found = by_name(scaling(sizes, values, seed=0, repeats=10))["power"].parameters
    best, _ = curve_fit(curved, np.array(sizes, dtype=float), values.numpy(), p0=(1, 1, 1))
    for name, value in zip("abc", best, strict=True):
        assert found[name].value == pytest.approx(value, rel=0.03)  # exponents lie 1.7 % apart


def test_the_error_is_that_of_sizes_left_out_one_at_a_time():
    sizes, values = measured(LOGARITHMIC, 0.02, seed=1)
    x, y = np.array(sizes, dtype=float), values.numpy()
    misses = {"logarithmic": [], "power": []}
    for size in SIZES:
        rest = x != size
        line = np.polyfit(np.log10(x[rest]), y[rest], 1)
        misses["logarithmic"].append(np.polyval(line, np.log10(size)) - y[~rest].mean())
        curve, _ = curve_fit(curved, x[rest], y[rest], p0=(2, 2, 0.1), maxfev=20_000,
                             bounds=([-np.inf, -np.inf, 0.02], [np.inf, np.inf, 3]))  # fmt: skip
        misses["power"].append(curved(size, *curve) - y[~rest].mean())
    for name, law in by_name(scaling(sizes, values, seed=0, repeats=10)).items():
        expected = math.sqrt(np.square(misses[name]).mean())
        assert law.error == pytest.approx(expected, rel=0.02)


def test_the_interval_of_a_slope_is_students():
    """Of a line with equal noise at every size, with as many degrees as draws less sizes."""
    x = np.log10(np.repeat(SIZES, 2))
    deviations = np.tile([-0.02, 0.02], len(SIZES))
    values = torch.from_numpy(0.5 + 0.1 * x + deviations)
    sizes = [size for size in SIZES for _ in range(2)]
    found = by_name(scaling(sizes, values, seed=0, repeats=4000))["logarithmic"].parameters["b"]
    degrees = len(x) - len(SIZES)
    error = math.sqrt((deviations**2).sum() / degrees / ((x - x.mean()) ** 2).sum())
    width = 2 * t.ppf(0.975, degrees) * error
    assert found.value == pytest.approx(0.1)
    assert found.high - found.low == pytest.approx(width, rel=0.06)


@pytest.mark.parametrize(
    ("name", "law", "noise"), [("logarithmic", LOGARITHMIC, 0.01), ("power", POWER, 0.005)]
)
def test_planted_laws_lie_within_their_intervals_as_often_as_stated(name, law, noise):
    runs = 100
    wanted = {
        **law,
        "at": truth(law, DOUBLE),
        "gain": truth(law, DOUBLE) - truth(law, SIZES[-1]),
    }
    covered = dict.fromkeys(wanted, 0)
    for seed in range(runs):
        report = scaling(*measured(law, noise, seed), seed=seed, repeats=300)
        fitted = by_name(report)[name]
        found = fitted.parameters | {
            "at": fitted.at(DOUBLE),
            "gain": fitted.gain(SIZES[-1], DOUBLE),
        }
        for key, value in wanted.items():
            covered[key] += found[key].low <= value <= found[key].high
    assert min(covered.values()) >= binom.ppf(0.002, runs, 0.95), covered


@pytest.mark.parametrize(("name", "law"), [("logarithmic", LOGARITHMIC), ("power", POWER)])
def test_the_law_that_holds_mostly_comes_first(name, law):
    first = [
        scaling(*measured(law, 0.005, seed), seed=0, repeats=5).laws[0].name for seed in range(60)
    ]
    assert first.count(name) >= 42


def test_the_answer_tells_both_gains_and_where_values_level_off():
    report = scaling(*measured(POWER, 0.001, seed=0), seed=0, repeats=100)
    gain = truth(POWER, DOUBLE) - truth(POWER, SIZES[-1])
    assert report.laws[0].gain(SIZES[-1], DOUBLE).value == pytest.approx(gain, rel=0.1)
    assert report.answer.startswith("Twice the data, 6400 items, would help: 0.005")
    assert "more by the power law" in report.answer
    assert "more by the logarithmic law" in report.answer
    assert "It levels off at 0.899 (0.898 to 0.902)." in report.answer
    straight = scaling(*measured(LOGARITHMIC, 0.001, seed=0), seed=0, repeats=100)
    assert "levels off" not in straight.answer


def test_more_of_the_same_may_not_help():
    flat = {"a": 0.8, "b": 0.0}
    assert "may not help" in scaling(*measured(flat, 0.01, seed=0), seed=0, repeats=100).answer
    falling = {"a": 0.8, "b": -0.1}
    assert "may not help" in scaling(*measured(falling, 0.01, seed=0), seed=0, repeats=100).answer


def test_the_seed_decides_the_intervals():
    sizes, values = measured(POWER, 0.01, seed=0)
    first, again, other = (
        scaling(sizes, values, seed=seed, repeats=50).to_dict() for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert set(first["gain_of_twice"]) == {"logarithmic", "power"}


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="at least 4 sizes of two draws"):
        scaling([10, 10, 20, 20, 40, 40], torch.zeros(6), seed=0)
    with pytest.raises(ValueError, match="80: 1"):
        scaling([10, 10, 20, 20, 40, 40, 80], torch.zeros(7), seed=0)
    with pytest.raises(ValueError, match="one finite value"):
        scaling([10, 10], torch.zeros(3), seed=0)
    with pytest.raises(ValueError, match="one finite value"):
        scaling([0, 10], torch.zeros(2), seed=0)
    with pytest.raises(ValueError, match="one finite value"):
        scaling([10, 10], torch.tensor([0.5, math.nan]), seed=0)
