"""Each way of writing a number, against values written down."""

import math

import pytest

from scantling.report.numbers import (
    cell_text,
    clock,
    counted,
    digits,
    duration,
    hours,
    interval,
    number_or_blank,
    short,
    some,
)


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999 B"), (1000, "1.00 kB"), (2.684e9, "2.68 GB"), (9.995e6, "10.0 MB"), (5.4e25, "54.0 YB")],
)
def test_short_has_three_digits_and_a_prefix(number, text):
    assert short(number, "B") == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (13, "13.0"),
        (80_540, "80.5 k"),
        (13e6, "13.0 M"),
        (7e9, "7.00 B"),
        (1.5e13, "15.0 T"),
        (2e16, "2e+16"),
    ],
)
def test_counted_has_the_units_of_the_literature(number, text):
    assert counted(number) == text


def test_digits_keep_their_zeros():
    assert [digits(x, 3) for x in (13.0, 132.4, 0.5)] == ["13.0", "132", "0.500"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.3688, "0.36880"),
        (3.0, "3"),
        (-0.0, "0"),
        (1e6, "1.000e+06"),
        (math.nan, ""),
        (math.inf, "inf"),
        (7, "7"),
        ("arm", "arm"),
    ],
)
def test_a_cell_has_five_digits(value, text):
    assert cell_text(value) == text


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [(None, ".4f", ""), (math.nan, ".4f", ""), (2.0, ".4f", "2.0000"), (12_345, ",.0f", "12,345")],
)
def test_what_is_missing_is_blank(value, form, text):
    assert number_or_blank(value, form) == text


def test_an_interval_has_its_ends():
    assert interval(-0.00001, 0.0224, "+z.4f") == "+0.0000 to +0.0224"


def test_one_is_singular():
    assert [some(n, "loss", of_many="es") for n in (0, 1, 2)] == ["0 losses", "1 loss", "2 losses"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(59, "59.0 seconds"), (61, "1.0 minutes"), (7200, "2.0 hours"), (2 * 86400, "2.0 days")],
)
def test_a_duration_has_its_largest_unit(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(3723, "1:02:03"), (59.6, "1:00"), (0, "0:00"), (-5, "0:00")])
def test_a_clock_counts_from_nothing(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(119, "119 seconds"), (3000, "50 minutes"), (7200, "2.0 hours"), (3e5, "83.3 hours")],
)
def test_a_cost_is_counted_in_hours(seconds, text):
    assert hours(seconds) == text
