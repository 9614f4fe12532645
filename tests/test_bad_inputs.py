"""docs/bad_inputs.md says what really happens with each of its inputs."""

import re

import bad_inputs
import pytest
from odd_files import outcome


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=f"{group}: {row.given}") for group, rows in bad_inputs.ROWS.items() for row in rows]
)
def test_what_happens_is_what_the_page_says(row, tmp_path):
    happened = outcome(row, tmp_path)
    assert re.fullmatch(re.escape(row.happens).replace("…", ".*"), happened), happened
    assert happened.isprintable()


def test_the_page_is_up_to_date():
    assert sum(map(len, bad_inputs.ROWS.values())) >= 60
    assert bad_inputs.PAGE.read_text(encoding="utf-8") == bad_inputs.page(), "run python tests/bad_inputs.py"
