"""Amounts as text: every spelling of one amount reads the same, and what is no amount is refused with an example that reads."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphprune.errors import BadTarget
from graphprune.quantities import KINDS, Seconds, amount, count

WHOLE = st.integers(1, 10**7)


@given(WHOLE, st.sampled_from([("k", 10**3), ("M", 10**6), ("G", 10**9)]), st.sampled_from(["", " "]))
def test_a_prefix_multiplies(number, prefix, space):
    letter, power = prefix
    for name, unit in [("size", "B"), ("memory", "B"), ("macs", "MACs"), ("params", "")]:
        text = f"{number}{space}{letter}{unit}"
        assert amount(name, text) == number * power == amount(name, text.lower()) == amount(name, f"{number * power:,}")
        assert amount(name, text) != amount(name, f"{number + 1}{letter}{unit}")  # the control
    assert amount("macs", f"{2 * number} {letter}FLOPs") == number * power


@given(st.integers(1, 100))
def test_a_share_is_the_same_in_every_spelling(percent):
    for name in ("params", "macs", "size", "memory", "latency", "ratio"):
        share = amount(name, f"{percent}%")
        assert share == percent / 100 and type(share) is float
        assert percent == 100 or amount(name, str(percent / 100)) == share
    assert amount("params", "1") == 1 and type(amount("params", "1")) is int  # a count, where "1.0" is all of them
    assert type(amount("params", "1.0")) is float


@given(WHOLE)
def test_times(number):
    assert amount("latency", f"{number} ms") == pytest.approx(number / 1e3) == pytest.approx(float(amount("latency", f"{number * 1000} us")))
    assert isinstance(amount("latency", f"{number}s"), Seconds)
    assert amount("speedup", f"{number}x") == number == amount("speedup", str(number))


@pytest.mark.parametrize("name", KINDS)
def test_examples_in_errors_are_readable(name):
    for wrong in ("", "much", "-1", "5 apples", "nan", "inf", "1e999 s", "0 %%", "0x", "1.2.3"):
        with pytest.raises(BadTarget, match=name) as caught:
            amount(name, wrong)
        for example in re.findall(r'"([^"]+)"', str(caught.value)):
            assert amount(name, example) > 0
    for share in ("150%", "1000%"):
        with pytest.raises(BadTarget):
            amount(name, share)


@pytest.mark.parametrize(("name", "text"), [("latency", "12"), ("macs", "2x"), ("speedup", "50%"), ("params", "5 MB"), ("size", "3 ms"), ("ratio", "3")])
def test_a_unit_of_another_kind_is_refused(name, text):
    with pytest.raises(BadTarget):
        amount(name, text)


@pytest.mark.parametrize("value", [0.5, 3, None, 1e9])
def test_numbers_pass_as_they_are(value):
    assert amount("size", value) is value


@given(st.integers(1, 10**15))
def test_what_is_shown_reads_back_within_its_digits(number):
    assert amount("params", count(number)) == pytest.approx(number, rel=0.006)
