"""Texts that packages bring along."""

from pathlib import Path

from planner.training.data.packaged import TEXTS, prose

LONG = "Anarchism advocates self-governed societies, and has done so for a long time. " * 5


def test_prose_is_what_a_reader_of_the_page_sees():
    markup = (
        "{{Redirect|a|{{nested|b}}}}\n"
        f"'''{LONG}'''<ref name=x>{{{{cite|y}}}}</ref> of [[state (polity)|states]] and "
        "[[law]], see [http://a.b c d].<ref name=x/>\n"
        f"== {LONG} ==\n"
        f"| {LONG}\n"
        "Short."
    )
    assert prose(markup) == f"{LONG} of states and law, see c d."


def test_texts_that_need_no_wheel_are_long_enough_to_test_on():
    for name in ("documentation", "docstrings"):
        assert len(TEXTS[name].read(Path("nowhere"))) > 300_000
