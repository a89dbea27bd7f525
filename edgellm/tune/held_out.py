"""Answers that a drafter is measured on, and never trained on: the same ones in every run."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from edgellm.speculative.buffer import Record

HELD_OUT_SHARE = 0.2


def is_held_out(record: Record) -> bool:
    """By the record's own hash alone, so that neither other records nor earlier runs have a say."""
    data = struct.pack(f"<I{len(record.prompt)}I", len(record.prompt), *record.prompt)
    data += struct.pack(f"<{len(record.answer)}I", *record.answer)
    number = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
    return number < HELD_OUT_SHARE * (1 << 64)


def divide(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """(those to train on, those held out), each once, in their order."""
    once = list(dict.fromkeys(records))
    return [one for one in once if not is_held_out(one)], [one for one in once if is_held_out(one)]
