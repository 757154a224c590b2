"""What is said of held-out pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.stages.pairs import calibration, pair_statistics, wilson_interval


def test_wilson_interval():
    # z^2 = 3.8416: center (0.8 + 0.19208) / 1.38416 = 0.716738, half 1.96 / 1.38416 * sqrt(0.016 + 0.009604) = 0.226578
    assert wilson_interval(8, 10) == pytest.approx((0.490159, 0.943316), abs=2e-5)
    # center 1.19208 / 1.38416 = 0.861230, half 1.416021 * 0.098 = 0.138770
    assert wilson_interval(10, 10) == pytest.approx((0.722460, 1.0), abs=2e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 9)[0] == 0 and wilson_interval(9, 9)[1] == 1


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 2000), st.floats(0, 1))
def test_wilson_interval_holds_the_share_and_stays_inside(n, share):
    low, high = wilson_interval(share * n, n)
    assert -1e-12 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1 + 1e-12


def test_pairs_on_which_model_and_length_differ_are_counted():
    """(chosen score, rejected score, tokens of the chosen, of the rejected): right and shorter, right and as long, wrong and longer."""
    scored = [(1.0, 0.0, 3, 9, "toy"), (1.0, 0.0, 5, 5, "toy"), (0.0, 1.0, 9, 3, "toy"), (1.0, 0.0, 9, 3, "toy")]
    facts = pair_statistics(scored)
    assert (facts["beats_longer"], facts["loses_to_longer"]) == (2, 1)
    assert facts["accuracy"] - facts["longer_is_better"] == pytest.approx(0.75 - 0.625)


def test_a_tie_is_half_right():
    """Margins of 0, 0 and ln 9: confidences of 0.5, 0.5 and 0.9, in the first and the fourth of five bins."""
    first, last = calibration(np.array([0.0, 0.0, np.log(9)]))
    assert first == {"confidence": 0.5, "accuracy": 0.5, "n": 2}
    assert last == {"confidence": pytest.approx(0.9), "accuracy": 1.0, "n": 1}
