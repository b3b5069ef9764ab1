"""Other libraries' errors in one line."""

import pytest

from diffattn._errors import first_line


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("no such folder.\nTry another."), "no such folder"),
        (OSError("\n  no answer  \n"), "no answer"),
        (KeyError(), "KeyError"),
        (ValueError("missing:\n  a\n  b"), "missing: a, b"),
        (ValueError("missing:\n  a\n  b\n  c\n  d\n  e"), "missing: a, b, c and 2 more"),
        (ValueError("missing:"), "missing:"),
    ],
    ids=repr,
)
def test_first_line(error, line):
    assert first_line(error) == line
