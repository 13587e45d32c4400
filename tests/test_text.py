"""Text from elsewhere: printable, of bounded length, and quick where it is huge."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import splitfx
from splitfx.errors import PlanError, SplitfxError
from splitfx.ground.table import table, wrap
from splitfx.ir.notes import Note
from splitfx.report.explain import Explanation
from splitfx.text import LINE, MESSAGE, VALUE, cut, first_line, one_line, printable, shown

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.\u2028\ud800\x00\x7f"


def safe(text: str) -> bool:
    return all(letter.isprintable() or letter in "\n\t" for letter in text) and text.encode("utf-8") is not None


def test_control_characters_are_written_out():
    assert printable("a\x1b[31mb\nc\td") == r"a\x1b[31mb" + "\nc\td"
    assert safe(printable(HOSTILE))


@given(st.text(alphabet=st.characters(codec=None)))
def test_whatever_the_text_no_terminal_obeys_it(text: str):
    assert not set(printable(text)) & {chr(c) for c in (*range(9), *range(11, 32), *range(127, 160), 0x202E, 0x2066)}
    assert printable(printable(text)) == printable(text)
    assert len(one_line(text, 50)) <= 50
    assert "\n" not in one_line(text)


def test_cut_keeps_both_ends():
    assert cut("abcdefghij", 5) == "ab…ij"
    assert cut("abc", 3) == "abc"
    assert len(cut("x" * 1000, 120)) == 120


@pytest.mark.parametrize(
    "value",
    ["g" * 10_000_000, 10**5000, [10**5000] * 10_000, {"k" * 10**6: "v"}, (((((((1,),),),),),),), [[[]]] * 10**6],
    ids=["text", "integer", "integers", "table", "nested", "lists"],
)
def test_no_value_is_shown_at_length(value: object):
    started = time.process_time()
    assert 0 < len(shown(value)) <= VALUE
    assert time.process_time() - started < 1


def test_short_values_are_shown_as_python_writes_them():
    for value in ("tile", 7, -1.5, [1, 2], (1, 3, 8, 8), {"a": 1}, None, True):
        assert shown(value) == repr(value)


def test_every_error_is_one_printable_line_of_ordinary_length():
    for cls in (SplitfxError, *SplitfxError.__subclasses__()):
        message = str(cls(f"layer {HOSTILE}\nis {'g' * 10_000_000} wrong"))
        assert safe(message)
        assert "\n" not in message
        assert len(message) <= MESSAGE
        assert message.startswith("layer ")
        assert message.endswith(" wrong")


def test_tables_and_sentences_hold_no_escapes():
    text = table(("layer", "n"), [(f"conv{HOSTILE}\nrow", 1)]) + wrap(f"note {HOSTILE}")
    assert safe(text)


def test_a_record_from_elsewhere_is_told_without_its_escapes():
    notes = (Note(f"conv{HOSTILE}", f"is {HOSTILE}", "did"),)
    told = Explanation(f"Net{HOSTILE}", f"torch{HOSTILE}", notes, ())
    assert safe(str(told))
    assert "Net" in str(told)


def test_sabotage_an_error_without_the_helper_would_be_seen():
    class Plain(Exception):
        pass

    assert not safe(str(Plain(HOSTILE.replace("\ud800", ""))))


def test_nearest_does_not_search_for_what_is_no_name():
    started = time.process_time()
    with pytest.raises(PlanError, match="no pass is named"):
        splitfx.Plan.from_toml(f"format = 1\n[[pass]]\nname = '{'g' * 1_000_000}'\n")
    assert time.process_time() - started < 2


def test_the_first_line_of_an_error_is_its_kind_where_it_says_nothing():
    assert first_line(RuntimeError("\n  one\x1b[2J\ntwo")) == "one\\x1b[2J"
    assert first_line(NotImplementedError()) == "NotImplementedError"
    assert len(first_line(ValueError("x" * 10_000))) == LINE
