"""A model's working memory: KV cache, compute buffers, and the decode call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgellm.backend.batch import Batch
from edgellm.backend.library import lib, take_errors
from edgellm.backend.model import Adapter, Model
from edgellm.errors import BackendError, ExpertReadError, ModelLoadError, ModelUnsupportedError
from edgellm.models.memory import whole_cells

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

MAX_SEQUENCES = 256
"""Sequence ids a unified cache accepts (`LLAMA_MAX_SEQ`)."""

_FLASH = {"auto": -1, "off": 0, "on": 1}


@dataclass(frozen=True, slots=True)
class EvalCallback:
    """A native function called for graph nodes (`ggml_backend_sched_eval_callback`), as addresses.

    For looking at what is computed; experts are paged by a buffer type of their own (kernels/expert_buffer.h). The
    owner keeps both alive as long as the context.
    """

    function: int
    user_data: int = 0


@dataclass(frozen=True, slots=True)
class ContextParams:
    """What a context is made with."""

    context_tokens: int  # KV cells, shared by all sequences; llama.cpp rounds up to a multiple of 256
    sequences: int  # sequence ids are 0 .. sequences - 1; at most MAX_SEQUENCES
    batch_tokens: int  # most rows of one decode
    outputs: int  # most rows with logits in one decode
    threads: int
    flash_attention: Literal["auto", "on", "off"] = "auto"
    embeddings: bool = False  # rows yield embeddings instead of logits
    eval_callback: EvalCallback | None = None


def _pointer(data: Bytes) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


class CacheFullError(BackendError):
    """No free KV cells for the batch; nothing was changed."""


class Context:
    """Owns a `llama_context`."""

    def __init__(self, model: Model, params: ContextParams) -> None:
        """Allocates the KV cache and the compute buffers. Raises ModelLoadError."""
        low = lib()
        raw = low.llama_context_default_params()
        # llama.cpp rounds up to this by itself, but bounds the batch by the number before.
        raw.n_ctx = whole_cells(params.context_tokens)
        raw.n_batch = raw.n_ubatch = params.batch_tokens
        raw.n_seq_max = params.sequences
        # llama.cpp aborts the process if there is room for fewer outputs than sequences.
        raw.n_outputs_max = raw.n_outputs_max_per_seq = max(params.outputs, params.sequences)
        raw.n_threads = raw.n_threads_batch = params.threads
        raw.flash_attn_type = _FLASH[params.flash_attention]
        raw.kv_unified = True  # sequences share cells: a common prefix is stored once
        raw.swa_full = True  # a window's keys stay until their cells are needed: see first_position
        raw.no_perf = True
        raw.embeddings = params.embeddings
        if params.embeddings:
            raw.pooling_type = low.LLAMA_POOLING_TYPE_NONE  # pooled in edgellm, so that any length can be chunked
        if params.eval_callback is not None:
            raw.cb_eval = ctypes.cast(params.eval_callback.function, type(raw.cb_eval))
            raw.cb_eval_user_data = params.eval_callback.user_data
        take_errors()
        self._handle: Any = low.llama_init_from_model(model.handle, raw)
        if not self._handle:
            raise ModelLoadError(f"llama.cpp could not make a context: {take_errors() or 'no reason given'}")
        self._experts = model.experts
        if self._experts is not None and self._experts.failed:
            reason = self._experts.take_error()
            self.close()
            raise ModelUnsupportedError(f"{model.path.name}: {reason}")
        self._memory = low.llama_get_memory(self._handle)
        self._decode = low.llama_decode
        self._logits = low.llama_get_logits_ith
        self.params = params
        self.context_tokens = params.context_tokens
        self.embedding_width = model.embedding_width
        self._n_vocab = model.vocab.n_tokens

    @property
    def handle(self) -> Any:
        """The `llama_context *`."""
        return self._handle

    def decode(self, batch: Batch) -> None:
        """Computes all rows of `batch`. Raises CacheFullError (nothing changed), ExpertReadError or BackendError."""
        status = self._decode(self._handle, batch.struct)
        if self._experts is not None and self._experts.failed:
            raise ExpertReadError(self._experts.take_error())
        if status == 0:
            return
        if status == 1:
            raise CacheFullError("no free KV cells for the batch")
        raise BackendError(f"llama_decode failed with status {status}: {take_errors() or 'no reason given'}")

    def logits(self, row: int) -> Floats:
        """Logits of batch row `row`, (vocabulary,), a view that the next decode overwrites."""
        pointer = self._logits(self._handle, row)
        if not pointer:
            raise BackendError(f"row {row} of the batch has no logits")
        return np.ctypeslib.as_array(pointer, shape=(self._n_vocab,))

    def logits_address(self, row: int) -> int:
        """Where the logits of batch row `row` are in memory, until the next decode."""
        pointer = self._logits(self._handle, row)
        if not pointer:
            raise BackendError(f"row {row} of the batch has no logits")
        return ctypes.addressof(pointer.contents)

    def embedding(self, row: int) -> Floats:
        """Final hidden state of batch row `row`, (embedding width,), a view that the next decode overwrites."""
        pointer = lib().llama_get_embeddings_ith(self._handle, row)
        if not pointer:
            raise BackendError(f"row {row} of the batch has no embedding")
        return np.ctypeslib.as_array(pointer, shape=(self.embedding_width,))

    def remove(self, sequence: int, start: int = 0, end: int = -1) -> bool:
        """Drops positions [start, end) of `sequence`; end -1 means all that follow. False if the model cannot."""
        return bool(lib().llama_memory_seq_rm(self._memory, sequence, start, end))

    def copy(self, source: int, target: int, end: int) -> None:
        """Lets `target` share positions [0, end) of `source`. No cell is copied; a recurrent state is copied whole."""
        lib().llama_memory_seq_cp(self._memory, source, target, 0, end)

    def save(self, sequence: int) -> Bytes:
        """A copy of what the cache holds for `sequence`, (bytes,): cells or recurrent state."""
        low = lib()
        size = low.llama_state_seq_get_size(self._handle, sequence)
        data = np.empty(size, np.uint8)
        written = low.llama_state_seq_get_data(self._handle, _pointer(data), size, sequence)
        return data[:written]

    def load(self, sequence: int, data: Bytes) -> bool:
        """Gives `sequence` what `save` copied. False if there is no run of free cells long enough."""
        return bool(lib().llama_state_seq_set_data(self._handle, _pointer(data), data.nbytes, sequence))

    @property
    def has_memory(self) -> bool:
        """False for encoders, which keep nothing from one call to the next and cannot generate."""
        return bool(self._memory)

    def saved_bytes(self, sequence: int) -> int:
        """How large `save` would be."""
        return int(lib().llama_state_seq_get_size(self._handle, sequence))

    def first_position(self, sequence: int) -> int:
        """The lowest position that every layer still holds for `sequence`, -1 if none."""
        return int(lib().llama_memory_seq_pos_min(self._memory, sequence))

    def last_position(self, sequence: int) -> int:
        """The highest position held for `sequence`, -1 if none."""
        return int(lib().llama_memory_seq_pos_max(self._memory, sequence))

    def set_adapters(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        """Makes exactly these adapters active, each at its scale. KV made before keeps what it was made with."""
        count = len(adapters)
        handles = (lib().llama_adapter_lora_p_ctypes * count)(*(adapter.handle for adapter, _ in adapters))
        scales = (ctypes.c_float * count)(*(scale for _, scale in adapters))
        if lib().llama_set_adapters_lora(self._handle, handles, count, scales) != 0:
            raise BackendError("llama.cpp refused the adapter set")

    def clear(self) -> None:
        """Forgets every sequence."""
        lib().llama_memory_clear(self._memory, False)

    def close(self) -> None:
        """Frees the context. Idempotent."""
        if self._handle:
            lib().llama_free(self._handle)
            self._handle = None
