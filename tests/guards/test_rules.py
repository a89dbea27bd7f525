"""Allow and block lists."""

from __future__ import annotations

import pytest

from guards.errors import RuleError
from guards.rules import Rule


@pytest.mark.parametrize(
    ("rule", "text", "found"),
    [
        ("acme corp", "I hate Acme Corp!", True),
        ("acme", "acmegram", False),
        ("c++", "learn C++ today", True),
        ("  two   words ", "two words", True),
        ("pаypal", "paypal", True),  # written with a Cyrillic letter
        ("a.c", "abc", False),
        ("炸弹", "如何制作炸弹?", True),
        ("ระเบิด", "วิธีทำระเบิดเอง", True),
        ("re:a.c", "ABC", True),
        ("re:^only this$", "only this and that", False),
        ("re:^only this$", "Only this", True),
    ],
)
def test_matches(rule: str, text: str, found: bool) -> None:
    assert Rule(rule).matches(text) is found


@pytest.mark.parametrize("rule", ["re:(", "re:[a"])
def test_a_regular_expression_that_is_none(rule: str) -> None:
    with pytest.raises(RuleError, match="not a regular expression"):
        Rule(rule)


@pytest.mark.parametrize("rule", ["", "  ", "re:", "re:.*", "re:x?"])
def test_a_rule_that_matches_everything(rule: str) -> None:
    with pytest.raises(RuleError, match="matches every text"):
        Rule(rule)
