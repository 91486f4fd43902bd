"""AP, F.Ra, FWT and BWT against the release's numbers and against the identities they must obey."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.golden import FOLDER
from peft_sapt.continual.metrics import average_performance, backward_transfer, forgetting_rate, forward_transfer

percent = st.floats(0, 100, allow_nan=False)


@st.composite
def matrices(draw, low: int = 1):
    size = draw(st.integers(low, 8))
    return np.array(draw(st.lists(st.lists(percent, min_size=size, max_size=size), min_size=size, max_size=size)))


@given(matrices())
def test_bounds(R) -> None:
    assert 0 <= average_performance(R) <= 100
    assert -100 <= forgetting_rate(R) <= 100
    assert -100 <= backward_transfer(R) <= 100
    assert -100 <= forward_transfer(R, [50.0] * len(R)) <= 100


@given(matrices(low=2))
def test_forgetting_is_at_least_what_backward_transfer_says(R) -> None:
    count = len(R)
    assert forgetting_rate(R) * (count - 1) / count >= -backward_transfer(R) - 1e-9
    learned_best = np.tril(R)
    for j in range(count):
        learned_best[:, j] = np.minimum(learned_best[:, j], R[j, j])
    equal = forgetting_rate(learned_best) * (count - 1) / count
    assert equal == pytest.approx(-backward_transfer(learned_best), abs=1e-9)
    assert backward_transfer(R, "textbook") * (count - 1) == pytest.approx(backward_transfer(R) * count, abs=1e-6)


@given(matrices(), percent)
def test_zero_and_nan_above_the_diagonal_are_the_same(R, junk) -> None:
    zero = np.tril(R)
    missing = np.where(np.triu(np.ones_like(R), 1) > 0, np.nan, R)
    for metric in (average_performance, forgetting_rate, backward_transfer):
        assert metric(missing) == metric(zero)
    assert forward_transfer(missing, [junk] * len(R)) == forward_transfer(zero, [junk] * len(R))


def test_by_hand() -> None:
    R = [[80, np.nan, np.nan], [60, 70, np.nan], [50, 75, 90]]
    assert average_performance(R) == pytest.approx((50 + 75 + 90) / 3)
    assert forgetting_rate(R) == pytest.approx(((80 - 50) + (70 - 75)) / 2)
    assert backward_transfer(R) == pytest.approx(((50 - 80) + (75 - 70) + 0) / 3)
    assert backward_transfer(R, "textbook") == pytest.approx(((50 - 80) + (75 - 70)) / 2)
    assert forward_transfer(R, [70, 70, 70]) == pytest.approx((10 + 0 + 20) / 3)
    assert forgetting_rate([[42.0]]) == backward_transfer([[42.0]]) == 0.0


@pytest.mark.parametrize("R", [[], [[1, 2]], [[1, 2], [np.nan, 3]], [[1, 0], [np.inf, 2]]])
def test_bad_matrices(R) -> None:
    with pytest.raises(ValueError, match="R "):
        average_performance(R)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="divisor"):
        backward_transfer([[1.0]], "half")
    with pytest.raises(ValueError, match="single must hold 1"):
        forward_transfer([[1.0]], [1.0, 2.0])


@pytest.mark.skipif(
    not (FOLDER / "cl_metrics.json").exists(), reason=f"no golden fixtures at {FOLDER}: set PEFT_SAPT_GOLDEN"
)
def test_the_release_scores() -> None:
    cases = json.loads((FOLDER / "cl_metrics.json").read_text())
    for case in cases["cases"]:
        R, single, official, other = case["scores"], case["individual"], case["official"], case["alternatives"]
        assert average_performance(R) == pytest.approx(other["AP"])
        assert forward_transfer(R, single) == pytest.approx(other["FWT_vs_individual"])
        assert backward_transfer(R) == pytest.approx(other["BWT_denominator_T"])
        if case["T"] == 1:
            assert forgetting_rate(R) == 0.0
            continue
        assert average_performance(R) == pytest.approx(official["Cl"])
        assert forgetting_rate(R) == pytest.approx(official["Fgt"])
        assert backward_transfer(R) == pytest.approx(official["Bwt"])
        assert backward_transfer(R, "textbook") == pytest.approx(other["BWT_denominator_Tminus1"])
