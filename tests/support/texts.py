"""Text that tokenizers find difficult, drawn by hypothesis and fixed."""

from __future__ import annotations

from hypothesis import strategies as st

PASSAGES = (
    """Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips
did Natalia sell altogether in April and May? Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72""",
    """from typing import List\n\n\ndef has_close(numbers: List[float], threshold: float) -> bool:
    \"\"\" Check if in given list of numbers, are any two numbers closer to each other\n    than given threshold.
    >>> has_close([1.0, 2.0, 3.0], 0.5)\n    False\n    \"\"\"\n    for idx, elem in enumerate(numbers):
        for idx2, elem2 in enumerate(numbers):\n            if idx != idx2:\n\t\t\treturn abs(elem - elem2) < threshold
""",
    "<table>\r\n\t<tr><td>It's O'Neill's</td> <td> don't </td>\r\n</table>\n\n\n  * we'll see -- 'quoted' \"text\"  \n",
    "Die Straße führt über Köln, naïve cafés in São Paulo; 東京タワーは高い。 한국어 문장 हिन्दी 🙂👩‍👩‍👧 e\u0301 done",
    '{"name": "tool_call", "arguments": {"path": "/usr/lib/x86_64", "n": 1234567, "deep": [[1, 2.50], null, true]}}',
)

_WORDS = (
    " the", "hello", " hello", " wor", "ld", "Hel", "lo", "unbelievable", "ing", " a", "b", " I", "'s", "'ll", "don't",
    " ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", "\n\n\n", " \n", "\n ", "1", "23", " 456", "7.89", "1,234",
    "<|im_end|>", "<|im_start|>", "</s>", "<0x0A>", "<bos>", "<unused5>", "<tool_call>", "<h1>", "<", "|", ">", "_",
    "(", ")", "()", ");", "{", "}", '"', "'", "=", "==", " =", "#", "//", "...", ".", ",", ":", "-", "--", "`", "$x",
    "é", "e\u0301", "ß", "中", "文字", "。", "日本語", "한국", "हि", "🙂", "👩‍👩‍👧", "\u200b",
    "\u00a0", "\u3000", "▁", "▁x", "\x00", "\x7f",
)  # fmt: skip

texts = st.lists(st.one_of(st.sampled_from(_WORDS), st.text(max_size=3)), max_size=14).map("".join)
"""What models write, and what they should not."""
