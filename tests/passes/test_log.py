"""The log of the passes."""

from utils.passes.log import PassLog


def filled() -> PassLog:
    log = PassLog()
    log.applied("equalized", "a -> b", "factors 0.5 to 2")
    log.skipped("equalized", "c", "read by add 'add_1'")
    log.skipped("equalized", "d", "read by add 'add_2'")
    log.skipped("equalized", "e", "its channels are not the second axis")
    log.applied("clipped weights", "a")
    log.note("one more thing")
    return log


def test_counts_are_of_applied_and_skipped():
    assert filled().counts() == {
        "equalized": {"applied": 1, "skipped": 3},
        "clipped weights": {"applied": 1, "skipped": 0},
    }


def test_reasons_that_differ_in_a_name_are_counted_together():
    assert filled().reasons("equalized") == ["2 read by add", "1 its channels are not the second axis"]


def test_the_summary_has_a_line_for_every_action_and_note():
    first, second, note = filled().summary().splitlines()
    assert first.endswith("1   skipped 3: 2 read by add; 1 its channels are not the second axis")
    assert second.split() == ["clipped", "weights", "1"]
    assert note == "  note: one more thing"


def test_the_listing_has_a_line_for_every_entry():
    lines = filled().listing().splitlines()
    assert lines[0] == "  equalized: a -> b (factors 0.5 to 2)"
    assert lines[1] == "  skipped, equalized: c (read by add 'add_1')"
    assert lines[-1] == "  clipped weights: a" and len(lines) == 5
