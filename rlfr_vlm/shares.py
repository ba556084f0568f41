"""Shares in percent, as people read them."""

from __future__ import annotations


def percent(share: float, digits: int = 1) -> str:
    """A share with its unit; see `points`."""
    return f"{points(share, digits)} %"


def points(share: float, digits: int = 1, sign: str = "") -> str:
    """A share, or a difference of two, as a number of percent with so many digits behind the point,
    and as many more as tell it from none and from all. sign: "+" puts one before what is positive.
    """
    value = round(100 * share, 9)  # what is left behind that, sums leave
    text = f"{value:{sign}.{digits}f}"
    if value and not float(text):
        return f"{value:{sign}.2g}"
    while abs(float(text)) == 100 != abs(value):
        digits += 1
        text = f"{value:{sign}.{digits}f}"
    return text
