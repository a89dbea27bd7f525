"""EdgeMoE's table of which experts follow which (arXiv 2308.14352, section 3.3), learned while serving.

EdgeMoE's key is all the experts of the two previous layers. With 128 experts such a key is hardly ever met twice (1.5 %
of the layers of a recorded Qwen3-30B-A3B trace, and nothing was gained where it was), so the key is taken apart: the
table counts how often each expert of a layer followed each single expert of the layer before ("near") and of the one
before that ("far"). Both are evidence for naive Bayes, tempered by a square root, since the two say much the same; what
the layer used for the token before is a little likelier than the rest. Recall on traces, in brackets that of whole keys
that fall back to single experts of the layer before: Qwen3-30B-A3B 61.7 % (57.0), Gemma-4-26B-A4B 59.3 (54.8),
gpt-oss-120b 40.5 (35.8). Whole keys besides would add 2 points in a model of 8 experts, and nothing in larger ones.

Every token teaches it, those of prompts too: without the 28 tokens of its prompt the Qwen3 trace loses 2 points.

kernels/pair_table.h is the native copy, which serves; this one explains it and is what it is compared with. Only
+ - * /, square roots and comparisons of float64, in the same order, so both agree bit by bit.
"""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgellm.models.files import write_atomic

TABLE_NAME = "pairs.bin"

MOST_PAIR = 255  # a row of pairs in which a count would pass it is halved: what is old fades
MOST_HOT = 65535  # the same of a layer's frequencies

_PRIOR = 8.0  # uses that a row of pairs takes to weigh as much as the layer's frequencies
_NEVER = 0.5  # uses that every expert starts with
_AGAIN = 1.6  # how much likelier an expert is that the layer used for the token before

_log = logging.getLogger(__name__)
_HEAD = struct.Struct("<16sII")  # what it is, layers, experts
_MAGIC = b"edgellm pairs 1\n"

Experts = Sequence[int]


class PairTable:
    """Foresees a layer's experts from those of the two layers before it in the same token."""

    def __init__(self, layers: int, experts: int) -> None:
        if layers < 1 or experts < 1:
            raise ValueError("there must be a layer and an expert")
        self.layers, self.experts = layers, experts
        self._near = np.zeros((layers, experts, experts), np.uint8)  # [layer, expert of the layer before, expert]
        self._far = np.zeros((layers, experts, experts), np.uint8)
        self._hot = np.zeros((layers, experts), np.uint16)
        self._last: list[Experts] = [()] * layers  # used for the last token
        self._rows: list[list[Experts]] = [[], []]  # of the last two layers: near, far; one a token
        self._at = -1  # the layer observed last

    def predict(self, layer: int, count: int, token: int = 0) -> list[int]:
        """The `count` experts that `layer` will most probably use, for a token of the step that is being observed.

        If the layer before was not the last that was observed, there is no evidence but frequency.
        """
        hot = self._hot[layer].astype(np.float64) + _NEVER
        share = hot / (self._hot[layer].sum() + _NEVER * self.experts)
        odds, weight = np.ones(self.experts), 1.0 / (_PRIOR * share)
        follows = 0 < layer == self._at + 1
        for counts, rows in ((self._near, self._rows[0]), (self._far, self._rows[1])):
            for expert in rows[token] if follows and token < len(rows) else ():
                odds *= 1.0 + counts[layer, expert] * weight
        score = share * np.sqrt(odds)
        if not follows or len(self._rows[0]) == 1:  # the rows of wider steps are other sequences, or other tokens
            score[list(self._last[layer])] *= _AGAIN
        return [int(expert) for expert in np.argsort(-score, kind="stable")[:count]]

    def observe(self, layer: int, experts: Experts) -> None:
        """`layer` used `experts` for the only token of a step."""
        self.observe_step(layer, [experts])

    def observe_step(self, layer: int, rows: Sequence[Experts]) -> None:
        """`layer` used `rows`, distinct experts, for each token of a step. A token begins anew with layer 0, after a
        layer that was left out, and where a step goes on with another number of tokens."""
        if layer == 0 or layer != self._at + 1 or len(rows) != len(self._rows[0]):
            self._rows = [[], []]
        for token, experts in enumerate(rows):
            for counts, before in ((self._near, self._rows[0]), (self._far, self._rows[1])):
                for expert in before[token] if before else ():
                    _count(counts[layer, expert], experts, MOST_PAIR)
            _count(self._hot[layer], experts, MOST_HOT)
        self._rows = [[tuple(experts) for experts in rows], self._rows[0]]
        self._last[layer] = self._rows[0][-1] if rows else ()
        self._at = layer

    def state(self) -> bytes:
        """All that was learned, `state_bytes` long: pairs near, pairs far, frequencies (little-endian)."""
        return self._near.tobytes() + self._far.tobytes() + self._hot.astype("<u2").tobytes()

    def restore(self, state: bytes) -> None:
        """Takes over what `state` gave for this shape. Raises ValueError for another length."""
        if len(state) != state_bytes(self.layers, self.experts):
            raise ValueError("the table has another shape")
        pairs = self._near.size
        self._near = np.frombuffer(state, np.uint8, pairs).reshape(self._near.shape).copy()
        self._far = np.frombuffer(state, np.uint8, pairs, pairs).reshape(self._far.shape).copy()
        self._hot = np.frombuffer(state, "<u2", offset=2 * pairs).astype(np.uint16).reshape(self._hot.shape)


def _count(counts: npt.NDArray[np.uint8] | npt.NDArray[np.uint16], experts: Experts, most: int) -> None:
    chosen = list(experts)
    if (counts[chosen] >= most).any():
        counts //= 2
    counts[chosen] += 1


def state_bytes(layers: int, experts: int) -> int:
    """Bytes of a table's state."""
    return 2 * layers * experts * (experts + 1)


def write_table(path: Path, layers: int, experts: int, state: bytes) -> None:
    """In one step. A table that cannot be written is logged: it is a help, not a need."""
    try:
        write_atomic(path, _HEAD.pack(_MAGIC, layers, experts) + zlib.compress(state, 1), make_folders=False)
    except FileNotFoundError:
        _log.debug("the table of experts is not kept: its folder was removed")
    except OSError as error:
        _log.warning("the table of experts %s cannot be written: %s", path, error)


def read_table(path: Path, layers: int, experts: int) -> bytes | None:
    """The state in a file; None if there is none, or it is damaged or of another model, which is logged."""
    size = state_bytes(layers, experts)
    try:
        with path.open("rb") as file:
            raw = file.read(_HEAD.size + 2 * size + 1024)  # what cannot be compressed grows a little
        if len(raw) < _HEAD.size or _HEAD.unpack_from(raw) != (_MAGIC, layers, experts):
            _log.warning("%s belongs to another model, and is begun anew", path)
            return None
        unpacking = zlib.decompressobj()
        state = unpacking.decompress(raw[_HEAD.size :], size + 1)
    except FileNotFoundError:
        return None
    except (OSError, zlib.error) as error:
        _log.warning("%s cannot be read, and is begun anew: %s", path, error)
        return None
    if len(state) == size and unpacking.eof:  # zlib has compared its checksum then
        return state
    _log.warning("%s is damaged, and is begun anew", path)
    return None
