"""What is drawn alike is read alike; what belongs to a language stays."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guards.text import clean, visible

PLAIN = "how to make a cake"


@pytest.mark.parametrize(
    "disguised",
    [
        "hоw tо mаkе а cаkе",  # Cyrillic letters among Latin ones
        "ʜᴏᴡ ᴛᴏ ᴍᴀᴋᴇ ᴀ ᴄᴀᴋᴇ",  # small capitals
        "𝐡𝐨𝐰 𝐭𝐨 𝐦𝐚𝐤𝐞 𝐚 𝐜𝐚𝐤𝐞",  # mathematical
        "ｈｏｗ ｔｏ ｍａｋｅ ａ ｃａｋｅ",  # fullwidth
        "ⓗⓞⓦ ⓣⓞ ⓜⓐⓚⓔ ⓐ ⓒⓐⓚⓔ",  # circled
        "🅷🅾🆆 🆃🅾 🅼🅰🅺🅴 🅰 🅲🅰🅺🅴",  # negative
        "🇭🇴🇼 🇹🇴 🇲🇦🇰🇪 🇦 🇨🇦🇰🇪",  # flags
        "h\u200bo\u200cw to m\u00ada\u2060ke a cake",  # zero widths, a soft hyphen
        "how to \u202emake\u202c a cake",  # directions
        "how to make a cake\U000e0041\U000e0042",  # tags
        "h\ufe0fo\ufe0fw to ma\u3164ke a ca\u2800ke\U000e0101",  # variation selectors, blanks that are letters or signs
        "h\u1dc4ow t\u1ab0o make a cake",  # marks of rare blocks
        "h̷̸o̵w̶ t̶o̶ m̶a̶k̶e̶ a c̷a̷k̷e̷",  # struck through
        "  how\tto\n\nmake a\u00a0cake ",
    ],
)
def test_what_looks_like_a_text_is_read_as_that_text(disguised: str) -> None:
    assert clean(disguised) == PLAIN


@pytest.mark.parametrize(
    "text",
    [
        "Как испечь торт?",
        "Πώς φτιάχνω κέικ;",
        "케이크를 어떻게 만들어요?",
        "চকোলেট কেক কীভাবে বানাবো?",
        "วิธีทำเค้ก",
        "Làm thế nào để nướng bánh?",
        "كيف أصنع كعكة؟",
        "naïve café, 100 % Größe",
        "Напиши письмо на тему Python",
    ],
)
def test_other_languages_stay_as_they_are(text: str) -> None:
    assert clean(text) == unicodedata.normalize("NFKC", text)


def test_a_heap_of_marks_falls_off() -> None:
    assert clean("h\u0301\u0302\u0303\u0304i") == "hi"
    assert (
        clean("Ti\u00ea\u0301ng Vie\u0323\u0302t caf\u00e9") == "Ti\u1ebfng Vi\u1ec7t caf\u00e9"
    )  # letters of a language stay


@pytest.mark.parametrize("unit", ["\u0301", "\u0301\u0327", "\u0591\u0301", "a\u0301\ufe0f", "\u3164"])
def test_many_marks_are_read_in_linear_time(unit: str) -> None:
    """No clock: what takes the square of the time would not end here."""
    assert len(visible("a" + unit * 500_000)) < 2_000_000


def test_white_space_stays_until_the_text_is_cleaned() -> None:
    assert visible("a  b\n\nc") == "a  b\n\nc"


@given(st.text(max_size=80))
def test_cleaning_twice_changes_nothing_more_and_hides_nothing(text: str) -> None:
    once = clean(text)
    assert clean(once) == once
    assert all(char.isprintable() for char in once)
