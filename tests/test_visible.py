import pytest

from rtpurbo.visible import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text,\n\ttabs and ünïcode 漢字 🙂", "plain text,\n\ttabs and ünïcode 漢字 🙂"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("a\rb\x08\x7f", "a\\rb\\x08\\x7f"),
        ("abc\u202edef", "abc\\u202edef"),
    ],
)
def test_control_characters_are_written_out(text, shown):
    assert visible(text) == shown
