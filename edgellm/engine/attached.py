"""The LoRA adapters that one context has at hand, and those with which it computes at present."""

from __future__ import annotations

from edgellm.backend.context import Context
from edgellm.backend.model import Adapter
from edgellm.engine.cache import AdapterSet
from edgellm.errors import AdapterNotFoundError


class AttachedAdapters:
    """Adapters by name. One set of them, with scales, is active at a time."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.by_name: dict[str, Adapter] = {}
        self.active: AdapterSet = ()

    def check(self, adapters: AdapterSet) -> None:
        """Raises AdapterNotFoundError if one of them is not at hand."""
        for use in adapters:
            if use.name not in self.by_name:
                raise AdapterNotFoundError(f"The adapter '{use.name}' is not loaded")

    def activate(self, adapters: AdapterSet) -> None:
        """Steps from now on compute with these, and no others."""
        if adapters != self.active:
            self._context.set_adapters([(self.by_name[use.name], use.scale) for use in adapters])
            self.active = adapters

    def add(self, name: str, adapter: Adapter) -> None:
        """Puts it at hand under `name`, which must be free."""
        self.by_name[name] = adapter

    def remove(self, name: str) -> None:
        """Frees it. No request may use it any more."""
        if any(use.name == name for use in self.active):
            self.activate(())
        self.by_name.pop(name).close()

    def close(self) -> None:
        """Frees them all, without touching the context."""
        for adapter in self.by_name.values():
            adapter.close()
