"""Shares in percent are never rounded to none or all."""

import math
import re

import pytest

from rlfr_vlm.shares import percent, points


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0.0 %"),
        (1.0, "100.0 %"),
        (0.5, "50.0 %"),
        (0.9994, "99.9 %"),
        (0.9996, "99.96 %"),
        (0.9999, "99.99 %"),
        (0.99999, "99.999 %"),
        (0.0004, "0.04 %"),
        (1e-5, "0.001 %"),
        (1.0001, "100.01 %"),
        (0.1 + 0.2 - 0.3, "0.0 %"),  # 0 but for rounding
        (math.nan, "nan %"),
    ],
)
def test_a_share_has_as_many_digits_as_tell_it_from_none_and_all(share, text):
    assert percent(share) == text


@pytest.mark.parametrize("digits", [0, 1, 2])
@pytest.mark.parametrize("exponent", range(1, 10))
def test_what_is_not_all_is_below_100_and_what_is_not_none_above_0(digits, exponent):
    assert float(points(1 - 10**-exponent, digits)) < 100
    assert float(points(10**-exponent, digits)) > 0
    assert float(points(10**-exponent - 1, digits, "+")) > -100


def test_differences_have_their_sign():
    assert [points(x, 1, "+") for x in (0.25, -0.25, 0.0, 0.0001)] == [
        "+25.0",
        "-25.0",
        "+0.0",
        "+0.01",
    ]


def test_what_is_printed_of_runs_keeps_to_it():
    from rlfr_vlm.evaluation.comparison_text import _percent as interval
    from rlfr_vlm.evaluation.statistics import Estimate

    found = interval(Estimate(0.9999, 0.0001, 0.99995, 5))
    assert found == "99.99 [0.01, 99.995]"


def test_no_other_way_to_print_shares_is_left():
    """A format of percent rounds."""
    from tests.test_imports import ROOT

    left = {
        (path.name, match[0])
        for path in ROOT.rglob("*.py")
        for match in re.finditer(r"\{[^{}\n]*:[+]?\.\d%\}", path.read_text())
    }
    assert not left
