"""Text as the classifier reads it: one spelling of what looks the same, and nothing that cannot be seen."""

from __future__ import annotations

import functools
import re
import unicodedata

# Letters drawn like Latin ones, each before the letter that it looks like (after Unicode Technical Standard 39,
# "confusables"). Fullwidth, mathematical, circled and superscript letters need none: NFKC takes them back.
_PAIRS = """
    аa вb еe ёe зz іi кk мm нh оo пn рp сc тt уy хx ѕs јj һh ԁd ԛq ԝw ґr єe їi
    АA ВB ЕE ЁE ЗZ ІI КK МM НH ОO РP СC ТT УY ХX ЅS ЈJ ҺH ԚQ ԜW
    αa βb γy εe ηn ιi κk νv οo ρp τt υu χx ωw ΑA ΒB ΕE ΖZ ΗH ΙI ΚK ΜM ΝN ΟO ΡP ΤT ΥY ΧX
    օo սu եt հh ոn ցg
    ᴀa ʙb ᴄc ᴅd ᴇe ꜰf ɢg ʜh ɪi ᴊj ᴋk ʟl ᴍm ɴn ᴏo ᴘp ʀr ꜱs ᴛt ᴜu ᴠv ᴡw ʏy ᴢz ɑa ɡg ıi
"""  # Cyrillic, Greek, Armenian, phonetic
_LOOKALIKES = {pair[0]: pair[1] for pair in _PAIRS.split()}
_PHONETIC = frozenset("ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢ")  # small capitals: never a language's own letters in numbers
_LETTER_BLOCKS = (0x1F130, 0x1F150, 0x1F170, 0x1F1E6)  # squared, circled, negative and flag letters, A to Z each
_BLOCK_LETTERS = {start + index: chr(ord("a") + index) for start in _LETTER_BLOCKS for index in range(26)}
_WORD = re.compile(r"[^\W\d_]+")
_OVERLAYS = re.compile(r"[\u0334-\u0338\u0488\u0489\u20d0-\u20ff]")  # strokes through letters, circles around them
_HEAP = re.compile(
    r"[^\W\d_][\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff]+"
)  # after composition: more marks on a letter than any one letter has
_MOSTLY = 0.5
UNPARTED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
"""Of a character class: Thai, Lao, Burmese, Khmer, Japanese, Chinese, which put no space between words."""

_MOST_MARKS = 8  # on one character: normalising takes the square of how many there are


# Printable by Unicode's categories, and yet nothing to be seen: variation selectors, fillers, an empty Braille cell.
_BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")


def visible(text: str) -> str:
    """`text` in compatibility form (NFKC), without what has no look of its own: control and format characters (zero
    widths, directions, tags), private use, blanks that count as letters or marks, heaps of combining marks. White space
    stays as it is."""
    if not text.isascii():
        text = _many_marks().sub(r"\1", _BLANK.sub("", text.translate(_BLOCK_LETTERS)))
        text = unicodedata.normalize("NFKC", text)
        text = _HEAP.sub(_bare, _OVERLAYS.sub("", text))
    return "".join(char for char in text if char.isspace() or char.isprintable())


def latinised(text: str) -> str:
    """`text` with letters that pass for Latin ones replaced by these: in words that mix scripts, and, where most of the
    text is Latin, in words made of nothing else."""
    if text.isascii():
        return text
    letters = [char for char in text if char.isalpha()]
    latin = sum(map(_is_latin, letters))
    mostly_latin = latin >= _MOSTLY * len(letters)

    def mended(match: re.Match[str]) -> str:
        word = match[0]
        alike = [char in _LOOKALIKES for char in word]
        if not any(alike):
            return word
        mixed = any(map(_is_latin, word)) or not _PHONETIC.isdisjoint(word)
        if mixed or (mostly_latin and all(alike)):
            return "".join(_LOOKALIKES.get(char, char) for char in word)
        return word

    return _WORD.sub(mended, text)


def clean(text: str) -> str:
    """`text` as it is classified: `visible`, `latinised`, and runs of white space made one space."""
    return collapsed(visible(text))


def collapsed(seen: str) -> str:
    """`clean` of a text that is `visible` already."""
    return " ".join(latinised(seen).split())


@functools.cache
def _many_marks() -> re.Pattern[str]:
    """More than _MOST_MARKS combining marks in a row; the first _MOST_MARKS of them are group 1."""
    marks = "".join(chr(code) for code in range(0x300, 0x1F000) if unicodedata.combining(chr(code)))
    return re.compile(f"([{marks}]{{{_MOST_MARKS}}})[{marks}]+")


def _bare(heap: re.Match[str]) -> str:
    return unicodedata.normalize("NFD", heap[0])[0]


def _is_latin(char: str) -> bool:
    return char < "\u0250" and char.isalpha()
