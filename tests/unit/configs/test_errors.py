import pytest

from configs.errors import UnknownAlgorithm, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, and\n\tlines", "plain, and\n\tlines"),
        ("é 漢 𝄞", "é 漢 𝄞"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\rb\x00\x07", "a\\rb\\x00\\x07"),
        ("abc\u202edef", "abc\\u202edef"),
        ("\u009b2J", "\\x9b2J"),
    ],
)
def test_what_a_terminal_would_obey_is_spelled_out(text, shown):
    assert visible(text) == shown


def test_a_name_without_end_is_cut():
    assert len(str(UnknownAlgorithm("a" * 10_000, ["AQLM"]))) < 200
