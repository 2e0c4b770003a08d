"""The study's densities and expected errors, against quadrature, samples and known values."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest

from obc.solver.errors import UserError
from pruning_vs_quantization import expected_sqnr, report, study_files
from pruning_vs_quantization.expected_error import (
    TAIL_SHARE,
    Gaussian,
    Laplace,
    StudentT,
    Uniform,
    advantage_db,
    best_quantisation,
    break_even,
    integer_codes,
    pruning_error,
    pruning_sqnr_db,
    quantisation_error,
    quantisation_sqnr_db,
    sparsity_of,
    sqnr_db,
)

integrate = pytest.importorskip("scipy.integrate")
stats = pytest.importorskip("scipy.stats")

STUDENT = StudentT(2.5, 12.0)
STUDENT_MASS = stats.t.cdf(12, 2.5) - stats.t.cdf(-12, 2.5)
# density, its pdf by another library, where its pdf ends for quadrature
CASES = {
    "gaussian": (Gaussian(), stats.norm.pdf, 12.0),
    "laplace": (Laplace(), stats.laplace.pdf, 60.0),
    "uniform": (Uniform(), lambda x: np.where(abs(x) <= 1, 0.5, 0.0), 1.0),
    "student": (STUDENT, lambda x: stats.t.pdf(x, 2.5) / STUDENT_MASS, 12.0),
}
BITS = (8, 7, 6, 5, 4, 3, 2)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


# -- densities -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", range(5))
def test_half_moments_equal_quadrature(case, order):
    density, pdf, _ = case
    for x in (0.03, 0.7, 1.0):
        expected = integrate.quad(lambda t: t**order * pdf(t), 0, x, epsabs=1e-13)[0]
        assert density.half_moment(order, np.float64(x)) == pytest.approx(expected, rel=1e-10)


def test_primitives_are_those_of_an_even_density(case):
    density, pdf, end = case
    for low, high in ((-0.9, 0.4), (-0.5, -0.2), (-np.inf, 0.3), (0.2, np.inf)):
        for order in (0, 1, 2):
            result = density.primitive(order, high) - density.primitive(order, low)
            expected = integrate.quad(
                lambda t, k=order: t**k * pdf(t),
                max(low, -end),
                min(high, end),
                points=[0],
                limit=300,
            )[0]
            assert result == pytest.approx(expected, abs=1e-8)


def test_known_kurtoses():
    assert Gaussian().kurtosis == pytest.approx(0, abs=1e-12)
    assert Laplace().kurtosis == pytest.approx(3)
    assert Uniform().kurtosis == pytest.approx(-1.2)
    assert StudentT(10.0, 1e6).kurtosis == pytest.approx(6 / (10 - 4), rel=1e-4)


def test_a_tail_is_the_share_that_is_cut_off():
    density = StudentT.with_tail(1.7, 0.02)
    assert 2 * stats.t.sf(density.end, 1.7) == pytest.approx(0.02)
    assert density.moment(0) == pytest.approx(1)


def test_magnitude_quantiles(case):
    density, _, _ = case
    for share in (0.0, 0.1, 0.5, 0.875, 0.999999):
        t = density.magnitude_quantile(share)
        assert 2 * density.half_moment(0, np.float64(t)) == pytest.approx(share, abs=1e-12)


# -- expected errors -------------------------------------------------------------------------------


def error_by_quadrature(pdf, end, step, codes):
    """E[(x − Q(x))²], piece by piece between the places where Q jumps."""
    inner = np.clip(step * (codes[1:] - 0.5), -end, end)
    edges = np.unique([-end, 0.0, *inner, end])

    def integrand(x):
        return (x - step * np.clip(np.rint(x / step), codes[0], codes[-1])) ** 2 * pdf(x)

    return sum(
        integrate.quad(integrand, low, high)[0]
        for low, high in zip(edges[:-1], edges[1:], strict=True)
    )


@pytest.mark.parametrize("balanced", [False, True])
def test_quantisation_error_equals_quadrature(case, balanced):
    density, pdf, end = case
    codes = integer_codes(3, balanced)
    for step in (0.05, 0.31, 1.4):
        result = quantisation_error(density, step, codes)
        expected = error_by_quadrature(pdf, end, step, codes)
        assert result.error == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert result.rounding >= 0 and result.clipping >= -1e-12


def test_nothing_is_clipped_by_a_wide_grid_nor_rounded_much_by_a_narrow_one():
    wide = quantisation_error(Uniform(), 0.5, integer_codes(4))
    narrow = quantisation_error(Uniform(), 1e-4, integer_codes(4))
    assert wide.clipping == 0 < wide.rounding
    assert narrow.rounding < 1e-8 < narrow.clipping


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("balanced", [False, True])
def test_no_step_of_a_dense_grid_is_better(case, bits, balanced):
    """Errors by the trapezium rule, on a pdf of another library."""
    density, pdf, end = case
    codes = integer_codes(bits, balanced)
    best = best_quantisation(density, codes)
    x = np.linspace(-min(end, 25), min(end, 25), 20001)
    weights = pdf(x) * (x[1] - x[0])
    steps = np.concatenate(
        [
            np.geomspace(0.02, 2.2, 300) * density.reach / 2 ** (bits - 1),
            best.step * np.linspace(0.9, 1.1, 101),
        ]
    )
    errors = [
        weights @ (x - step * np.clip(np.rint(x / step), codes[0], codes[-1])) ** 2
        for step in steps
    ]
    assert min(errors) >= best.error * (1 - 2e-3)  # the trapezium rule's own error
    assert errors[300 + 50] == pytest.approx(best.error, rel=2e-3)


def test_the_best_grid_of_a_uniform_density_is_known():
    """2^b − 1 levels in the middle of as many equal cells: Δ²/12 with Δ = 2/(2^b − 1)."""
    for bits in (2, 3, 5, 8):
        best = best_quantisation(Uniform(), integer_codes(bits, balanced=True))
        step = 2 / (2**bits - 1)
        assert best.step == pytest.approx(step, rel=1e-5)
        assert best.error == pytest.approx(step**2 / 12, rel=1e-9)


def test_three_levels_of_a_gaussian_are_those_of_max():
    """J. Max, Quantizing for minimum distortion (1960), table II: N = 3."""
    best = best_quantisation(Gaussian(), integer_codes(2, balanced=True))
    assert best.step == pytest.approx(1.224, abs=5e-4)
    assert best.error == pytest.approx(0.1902, abs=5e-5)


def test_pruning_error_equals_quadrature(case):
    density, pdf, _ = case
    for sparsity in (0.25, 0.5, 0.875):
        t = density.magnitude_quantile(sparsity)
        expected = 2 * integrate.quad(lambda x: x**2 * pdf(x), 0, t)[0]
        assert pruning_error(density, sparsity) == pytest.approx(expected, rel=1e-9)


def test_decibels():
    assert sqnr_db(4.0, 1.0) == sqnr_db(40.0, 10.0) == pytest.approx(6.0206, abs=1e-4)
    assert sqnr_db(1.0, 0.0) == math.inf
    assert math.isnan(sqnr_db(0.0, 0.0))


# -- what the study says ---------------------------------------------------------------------------


def test_gaussian_table():
    pruning = (11.47, 9.82, 8.31, 6.91, 5.58, 4.30, 3.03)
    balanced = (40.5, 35.1, 29.7, 24.3, 18.9, 13.3, 7.2)
    full = (40.6, 35.2, 29.8, 24.5, 19.3, 13.9, 8.3)
    for width, pruned, odd, even in zip(BITS, pruning, balanced, full, strict=True):
        assert pruning_sqnr_db(Gaussian(), width) == pytest.approx(pruned, abs=0.02)
        assert quantisation_sqnr_db(Gaussian(), width, True) == pytest.approx(odd, abs=0.05)
        assert quantisation_sqnr_db(Gaussian(), width) == pytest.approx(even, abs=0.05)


@pytest.mark.parametrize(("bits", "kurtosis"), [(2, 6), (3, 11), (4, 18)])
def test_kurtosis_from_which_pruning_wins(bits, kurtosis):
    even = break_even(bits, 4.0, 1.3, TAIL_SHARE)
    assert even.kurtosis == pytest.approx(kurtosis, abs=1)
    assert advantage_db(even, bits) == pytest.approx(0, abs=1e-4)
    lighter = StudentT.with_tail(1.1 * even.degrees)
    heavier = StudentT.with_tail(0.9 * even.degrees)
    assert lighter.kurtosis < even.kurtosis < heavier.kurtosis
    assert advantage_db(lighter, bits) > 0 > advantage_db(heavier, bits)


@pytest.mark.parametrize("name", ["Gaussian", "Laplace", "Student-t, ν = 1.5"])
def test_ten_million_numbers_agree(name):
    density = expected_sqnr.compared_densities(TAIL_SHARE)[name]
    values = density.sample(10**7, np.random.default_rng(0))
    for bits in (8, 2):
        codes = integer_codes(bits)
        step = best_quantisation(density, codes).step
        quantised = step * np.clip(np.rint(values / step), codes[0], codes[-1])
        magnitudes = abs(values)
        threshold = np.quantile(magnitudes[::97], sparsity_of(bits))
        power, lost = np.mean(values**2), np.mean(np.where(magnitudes < threshold, values, 0) ** 2)
        result = sqnr_db(power, np.mean((values - quantised) ** 2))
        assert quantisation_sqnr_db(density, bits) == pytest.approx(result, abs=0.05)
        assert pruning_sqnr_db(density, bits) == pytest.approx(sqnr_db(power, lost), abs=0.05)


# -- the command -----------------------------------------------------------------------------------


def test_the_command_prints_draws_and_resumes(tmp_path, capsys, caplog, monkeypatch):
    out = tmp_path / "expected_sqnr"
    words = ["--bits", "2", "--out", str(out), "--samples", "100000"]
    assert expected_sqnr.main(words) == 0
    printed = capsys.readouterr().out
    assert "| Gaussian | 0.00 | quantising | 8.26 |" in printed
    assert "| Gaussian | 0.00 | pruning | 3.03 |" in printed
    assert "2 bits: pruning wins from an excess kurtosis of 6.1" in printed
    figures = json.loads((out / "expected_sqnr.json").read_text())["figures"]
    assert figures["kurtosis"]["2"]["crossing"] == pytest.approx(6.1, abs=0.05)
    assert 0 < figures["largest_disagreement_db"] < 0.3
    for name in ("expected_sqnr", "kurtosis_crossing"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")

    (section,) = report.study_sections([tmp_path], None)  # what the study's page makes of it
    assert section.gaps[2] == pytest.approx(8.26 - 3.03, abs=0.01)
    assert "excess kurtosis of 6.1 at 2 bits" in section.text and len(section.pictures) == 2

    monkeypatch.setattr(expected_sqnr, "density_figures", None)  # would fail if it worked again
    assert expected_sqnr.main(words) == 0
    assert capsys.readouterr().out == printed

    assert expected_sqnr.main([*words, "--balanced"]) == 2
    error = capsys.readouterr().err
    assert "balanced was false, is now true" in error and "--restart" in error


def test_broken_results_are_named(tmp_path, capsys):
    path = tmp_path / "expected_sqnr.json"
    for content in ('{"settings": {}, "fig', "[1]", "{}", "\udcff"):
        path.write_bytes(content.encode(errors="surrogateescape"))
        assert expected_sqnr.main(["--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert str(path) in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", "1"], "--bits must be from 2 to 8; got 1"),
        (["--bits", "nine"], "--bits must be from 2 to 8; got nine"),
        (["--tail", "5"], "--tail must be in [0, 1); got 5. Did you mean 0.05?"),
        (["--samples", "-1"], "--samples must be a whole number from 0"),
        (["--device", "cpu"], "unrecognized arguments"),
    ],
)
def test_wrong_options(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        expected_sqnr.main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_an_uncut_student_is_refused(tmp_path, capsys):
    assert expected_sqnr.main(["--tail", "0", "--out", str(tmp_path)]) == 2
    assert "--tail must be above 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    assert expected_sqnr.main(["--out", str(tmp_path)]) == 2
    assert "pip install -r requirements-study.txt" in capsys.readouterr().err


# -- result files ----------------------------------------------------------------------------------


def test_results_come_back_and_infinity_is_null(tmp_path):
    path, settings = tmp_path / "new" / "result.json", {"bits": (8, 2), "weights": tmp_path}
    assert study_files.finished(path, settings) is None
    study_files.write_result(path, settings, {"a": math.inf, "b": np.float64(2.5), "c": [math.nan]})
    assert study_files.finished(path, settings) == {"a": None, "b": 2.5, "c": [None]}
    assert study_files.finished(path, settings, restart=True) is None


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bits": [8], "seed": 0}, "bits was [8, 2], is now [8]"),
        ({"bits": [8, 2]}, "seed was 0, is now not set"),
        ({"bits": [8, 2], "seed": 0, "new": "x"}, 'new was not set, is now "x"'),
    ],
)
def test_other_settings_are_refused(tmp_path, settings, named):
    path = tmp_path / "result.json"
    study_files.write_result(path, {"bits": [8, 2], "seed": 0}, {})
    with pytest.raises(UserError) as refused:
        study_files.finished(path, settings)
    assert named in str(refused.value) and "--restart" in str(refused.value)
