"""A loaded GGUF model: weights and vocabulary, shared by the contexts made from it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from edgellm.backend.experts import ExpertStore, experts_in
from edgellm.backend.library import lib, take_errors
from edgellm.backend.packing import packing, packing_kernels
from edgellm.backend.vocab import Vocab
from edgellm.errors import AdapterError, ModelLoadError, ModelUnsupportedError


class Model:
    """Owns a `llama_model`. Close contexts and adapters before it."""

    def __init__(
        self, path: Path, *, mapped: bool = True, packed: bool = False, experts: ExpertStore | None = None
    ) -> None:
        """Maps the file, or reads it into memory, and prepares the weights.

        With `experts`, the model's expert tensors lie there; the store is then the model's, and closed with it, also if
        it cannot be loaded.
        Raises ModelLoadError with llama.cpp's own words, ModelUnsupportedError for experts that cannot be paged.
        """
        self.path = path
        self.experts = experts
        self._handle: Any = None
        try:
            self._load(mapped, packed)
        except BaseException:
            self.close()
            raise

    def _load(self, mapped: bool, packed: bool) -> None:
        low, path, experts = lib(), self.path, self.experts
        params = low.llama_model_default_params()
        if not mapped:
            params.load_mode = low.LLAMA_LOAD_MODE_NONE
        take_errors()
        with packing(packed), experts_in(experts):
            self._handle = low.llama_model_load_from_file(str(path).encode(), params)
        if not self._handle:
            raise _load_error(path)
        if experts is not None and (wrong := experts.fault):
            raise ModelUnsupportedError(f"{path.name}: {wrong}")
        self.vocab = Vocab(self._handle)
        if fault := self.vocab.fault():
            raise ModelLoadError(f"{path.name} cannot be used: {fault}")
        self.trained_context_tokens: int = low.llama_model_n_ctx_train(self._handle)
        self.embedding_width: int = low.llama_model_n_embd_out(self._handle)
        self.has_encoder: bool = low.llama_model_has_encoder(self._handle)
        self.has_decoder: bool = low.llama_model_has_decoder(self._handle)
        # Keys and values further back than this many positions may be gone from a cache; 0: none ever are.
        self.window_tokens: int = low.llama_model_n_swa(self._handle)
        # Recurrent state cannot be cut back to an earlier position: no partial prefix reuse, no drafting.
        self.can_roll_back: bool = not (
            low.llama_model_is_recurrent(self._handle) or low.llama_model_is_hybrid(self._handle)
        )

    @property
    def handle(self) -> Any:
        """The `llama_model *`."""
        return self._handle

    def close(self) -> None:
        """Frees the model. Idempotent."""
        if self._handle:
            lib().llama_model_free(self._handle)
            self._handle = None
        if self.experts is not None:
            self.experts.close()


def load_packed(path: Path) -> Model:
    """A model in memory of its own, packed where this processor has the instructions, else mapped. Raises as Model."""
    packed = packing_kernels() is not None
    return Model(path, mapped=not packed, packed=packed)


class VocabFile:
    """The vocabulary of a model's file alone: loads in a moment, and takes no memory for weights."""

    def __init__(self, path: Path) -> None:
        """Raises ModelLoadError, as Model does."""
        low = lib()
        params = low.llama_model_default_params()
        params.vocab_only = True
        take_errors()
        self._handle: Any = low.llama_model_load_from_file(str(path).encode(), params)
        if not self._handle:
            raise _load_error(path)
        self.vocab = Vocab(self._handle)
        if fault := self.vocab.fault():
            self.close()
            raise ModelLoadError(f"{path.name} cannot be used: {fault}")

    def close(self) -> None:
        """Frees the vocabulary, which nobody may use any more. Idempotent."""
        if self._handle:
            lib().llama_model_free(self._handle)
            self._handle = None


def _load_error(path: Path) -> ModelLoadError:
    reason = take_errors().replace(f"{path.parent}{os.sep}", "")  # clients see it
    return ModelLoadError(f"llama.cpp could not load {path.name}: {reason or 'no reason given'}")


class Adapter:
    """A LoRA adapter (GGUF) loaded for one model."""

    def __init__(self, model: Model, path: Path) -> None:
        """Raises AdapterError when the file does not fit the model."""
        take_errors()
        self._handle: Any = lib().llama_adapter_lora_init(model.handle, str(path).encode())
        if not self._handle:
            raise AdapterError(f"adapter {path.name} does not fit the model: {take_errors() or 'no reason given'}")
        self.path = path

    @property
    def handle(self) -> Any:
        """The `llama_adapter_lora *`."""
        return self._handle

    def close(self) -> None:
        """Frees the adapter; no context may be using it. Idempotent."""
        if self._handle:
            lib().llama_adapter_lora_free(self._handle)
            self._handle = None
