"""The input of one `llama_decode`, kept in numpy arrays so that filling it costs no per-token ctypes work."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgellm.backend.library import lib


class Batch:
    """Up to `capacity` rows, each a token of one sequence at a position, with or without output."""

    def __init__(self, capacity: int) -> None:
        low = lib()
        self.capacity = capacity
        self.n_tokens = 0
        self._token = np.zeros(capacity, np.int32)
        self._pos = np.zeros(capacity, np.int32)
        self._seq = np.zeros(capacity, np.int32)
        self._n_seq = np.ones(capacity, np.int32)
        self._output = np.zeros(capacity, np.int8)
        # llama_batch wants a pointer to each row's list of sequence ids; every list here has one member.
        self._seq_pointers = self._seq.ctypes.data + 4 * np.arange(capacity, dtype=np.uintp)
        self._struct = low.llama_batch(
            n_tokens=0,
            token=self._token.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            pos=self._pos.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            n_seq_id=self._n_seq.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=self._seq_pointers.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
            logits=self._output.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def clear(self) -> None:
        """Forgets all rows."""
        self.n_tokens = 0

    def extend(self, tokens: Sequence[int], first_position: int, sequence: int, *, outputs: int) -> int:
        """Adds rows for consecutive positions; the last `outputs` of them yield logits. Returns the first row's index.

        The caller keeps within `capacity`.
        """
        start, count = self.n_tokens, len(tokens)
        end = start + count
        if count == 1:  # the common case: a decoding sequence
            self._token[start] = tokens[0]
            self._pos[start] = first_position
            self._seq[start] = sequence
            self._output[start] = outputs
        else:
            self._token[start:end] = tokens
            self._pos[start:end] = range(first_position, first_position + count)
            self._seq[start:end] = sequence
            self._output[start : end - outputs] = 0
            self._output[end - outputs : end] = 1
        self.n_tokens = end
        return start

    @property
    def struct(self) -> Any:
        """The `llama_batch`, valid while this object lives."""
        self._struct.n_tokens = self.n_tokens
        return self._struct
