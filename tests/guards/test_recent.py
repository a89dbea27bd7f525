from __future__ import annotations

from guards.recent import LONG, Recent


def test_what_was_asked_for_longest_ago_goes_first() -> None:
    recent: Recent[str, int] = Recent(2)
    recent.keep("a", 1, "a")
    recent.keep("b", 2, "b")
    assert recent.get("a") == 1
    recent.keep("c", 3, "c")
    assert [recent.get(key) for key in "abc"] == [1, None, 3]


def test_a_value_that_is_kept_again_is_new() -> None:
    recent: Recent[str, int] = Recent(2)
    for key, value in (("a", 1), ("b", 2), ("a", 3), ("c", 4)):
        recent.keep(key, value, key)
    assert [recent.get(key) for key in "abc"] == [3, None, 4]


def test_of_long_texts_nothing_is_kept() -> None:
    """A word may be as long as a client likes, and one window all the same."""
    recent: Recent[int, float] = Recent(9)
    recent.keep(1, 0.0, "x" * LONG)
    recent.keep(2, 1.0, "x" * (LONG + 1))
    assert (recent.get(1), recent.get(2)) == (0.0, None)
