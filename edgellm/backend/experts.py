"""Experts paged from flash: the stacked expert tensors of a MoE model lie in a store instead of in memory.

The store (kernels/expert_store.h) holds some of the experts, reads the others when a step needs them, and multiplies by
them on llama.cpp's threads (kernels/expert_buffer.h). What is in it, and how much it may hold, is edgellm.moe's affair.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgellm import _kernels
from edgellm.backend.host import UnknownLibraryError, connect_host
from edgellm.backend.narrow import narrow_size
from edgellm.backend.packing import INSTALLING, packable_types, packing_kernels
from edgellm.errors import ModelLoadError, ModelUnsupportedError

Counts = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float32]
RouterArrays = tuple[Floats, Floats, Floats, bool]

READERS = 4
"""Threads that read: what keeps a disk busy, at little cost while they wait."""


_NATIVE_ERRORS = (RuntimeError, ValueError, OSError, MemoryError, IndexError, TypeError, OverflowError)


@dataclass(frozen=True, slots=True)
class Slice:
    """One stacked tensor of a MoE layer: a (rows, columns) matrix for each expert."""

    name: str
    type: int  # ggml's number
    type_name: str  # "Q4_K"
    columns: int
    rows: int
    layer: int  # MoE layers count from 0
    file: int  # index of the file
    offset: int  # bytes from the start of the file to expert 0's matrix
    n_bytes: int  # of one expert's matrix, as the type has it
    may_pack: bool = True
    offsets: tuple[int, ...] = ()  # (experts,): where each one's matrix is; empty: they follow each other
    widths: bytes = b""  # (experts,): bits to which each was narrowed in the file; empty, 0: not

    @property
    def packed(self) -> bool:
        """Whether it is rearranged on its way into memory (kernels/packed.h)."""
        return (
            self.may_pack
            and self.type_name in packable_types()
            and _kernels.can_pack(self.type, self.columns, self.rows)
        )

    @property
    def extent_bytes(self) -> int:
        """Memory for one expert's matrix, with what unbuffered reads need around it."""
        return self._native().extent

    def offset_of(self, expert: int) -> int:
        """Bytes from the start of the file to the expert's matrix."""
        return self.offsets[expert] if self.offsets else self.offset + expert * self.n_bytes

    def stored_bytes(self, expert: int) -> int:
        """Bytes of the expert's matrix in the file."""
        width = self.widths[expert] if self.widths else 0
        return narrow_size(self.type, self.columns, self.rows, width) if width else self.n_bytes

    def of_layer(self, layer: int) -> Slice:
        """The same, of another layer."""
        return replace(self, layer=layer)

    def _native(self) -> _kernels.ExpertSlice:
        return _kernels.ExpertSlice(
            self.name,
            type=self.type,
            columns=self.columns,
            rows=self.rows,
            layer=self.layer,
            file=self.file,
            offset=self.offset,
            bytes=self.n_bytes,
            packed=self.packed,
            offsets=list(self.offsets),
            widths=self.widths,
        )


@dataclass(frozen=True, slots=True)
class ExpertStats:
    """Counters since the model was loaded. An expert counts once for each layer and step that needs it."""

    visits: int  # layers of steps
    needed: int
    hits: int  # in memory when they were needed, not counting those read ahead for it
    loads: int  # read when they were needed, and kept
    streamed: int  # read when they were needed, and not kept: the layer needed more than there were slots
    prefetched: int  # read ahead
    prefetch_used: int
    prefetch_wasted: int  # left without having been used
    reads: int
    bytes: int
    stall_ns: int  # the step waited for a read
    read_ns: int  # readers were reading, added up over them


class ExpertStore:
    """Owns the slots, the readers and the open files. Close it after the model that lies in it."""

    def __init__(
        self,
        slices: Sequence[Slice],
        files: Sequence[Path],
        *,
        experts: int,
        pools: Sequence[int],
        slots: Sequence[int],
        stream_bytes: int,
        direct: bool = True,
        checksums: npt.NDArray[np.uint32] | None = None,
        trial_widths: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        """`pools[layer]` is the pool of the layer's experts, `slots[pool]` how many of them it holds; `stream_bytes`
        is the area for those of one layer that find no slot: at least two of the largest matrices. `checksums`,
        (slices, experts), are compared with the `crc32c` of what is read. `trial_widths`, (layers, experts): bits to
        which experts are narrowed and widened again when they are read, to see what it does to them; 0: not.

        Raises ModelLoadError; ModelUnsupportedError where llama.cpp is not the library that was expected.
        """
        if fault := paging_fault():
            raise ModelUnsupportedError(f"experts cannot be paged: {fault}")
        try:
            self._native: _kernels.ExpertStore | None = _kernels.ExpertStore(
                layers=len(pools),
                experts=experts,
                slices=[piece._native() for piece in slices],
                files=[str(path) for path in files],
                pools=list(pools),
                slots=list(slots),
                stream_bytes=stream_bytes,
                readers=READERS,
                direct=direct,
                checksums=[] if checksums is None else checksums.ravel().tolist(),
                trial_widths=[] if trial_widths is None else trial_widths.ravel().tolist(),
            )
        except _NATIVE_ERRORS as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            for path in files:  # clients see it
                reason = reason.replace(str(path), path.name)
            raise ModelLoadError(f"the experts cannot be paged: {reason}") from None
        self.slots = tuple(slots)
        self._layers = len(pools)

    @property
    def native(self) -> _kernels.ExpertStore:
        if self._native is None:
            raise ModelLoadError("the expert store is closed")
        return self._native

    @property
    def fault(self) -> str | None:
        """Why the model that was loaded with this store cannot be paged; None if it is.

        Layers that llama.cpp leaves out, such as those for the prediction of several tokens, are no fault.
        """
        if self.native.refused:
            return f"{self.native.refused} is used in a way that cannot be paged"
        return None if any(self.native.claimed) else "llama.cpp has loaded its experts in another way"

    @property
    def claimed(self) -> list[bool]:
        """(layers,): whether the model that was loaded with this store computes the layer."""
        return [bool(there) for there in self.native.claimed]

    @property
    def direct(self) -> bool:
        """Whether reads go past the page cache."""
        return self.native.direct

    @property
    def deleted(self) -> bool:
        """Whether a file has lost its name. What is read is still what it was."""
        return self.native.deleted

    @property
    def failed(self) -> bool:
        """A read has failed: what was computed since is worthless."""
        return self._native is not None and self._native.failed

    def take_error(self) -> str:
        """What failed, and the store works again. Call it between steps."""
        return self.native.take_error()

    @property
    def stats(self) -> ExpertStats:
        return ExpertStats(**self.native.stats())

    @property
    def reads(self) -> int:
        """`stats.reads`, for less."""
        return self.native.reads

    @property
    def resident_bytes(self) -> int:
        """Memory of the slots that hold an expert."""
        return self.native.resident_bytes

    def read_ahead(self, on: bool) -> None:
        """Whether steps read the experts that look-ahead foresees. Between steps."""
        self.native.set_ahead(on)

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Reads these experts, the first of them first, while there is nothing more urgent to read."""
        self.native.prefetch(layer, list(experts), len(experts))

    def preload(self, layer: int, experts: Sequence[int]) -> None:
        """Fills free slots with these experts, the first of them first, while there is nothing else to read."""
        self.native.preload(layer, list(experts))

    def counts(self) -> Counts:
        """(layers, experts): in how many steps each was needed."""
        return self.native.counts().reshape(self._layers, -1)

    def set_routers(self, routers: Sequence[RouterArrays], used: int, width: int) -> None:
        """What look-ahead needs: each layer's (weights, bias, selection bias, sigmoid), for `used` experts a token and
        router inputs of (width,). Arrays of no size: there is none."""
        self.native.set_routers(list(routers), used, width)

    @property
    def predictor(self) -> str:
        """What foresaw experts last: "routers" or "table"; "none" if nothing has yet. From any thread."""
        return self.native.predictor

    def table_state(self) -> bytes | None:
        """What the table of experts that follow one another has learned; None where every expert has a slot, and
        nothing need be foreseen. Between steps."""
        table = self.native.table
        return None if table is None else table.state()

    def restore_table(self, state: bytes) -> None:
        """Takes over what `table_state` gave for a model of this shape. Between steps."""
        if (table := self.native.table) is not None:
            table.restore(state)

    def set_route(self, route: Sequence[int], foreseen: Sequence[int] = ()) -> None:
        """For benchmarks: the next steps use these experts, (layers * used,), in place of what the routers choose, and
        look-ahead foresees those in `foreseen`. No experts: all as it was. Between steps."""
        self.native.set_route(list(route), list(foreseen))

    def log_routes(self, on: bool) -> None:
        """Whether what routers choose, and what look-ahead foresees, is kept until `take_log`. Between steps."""
        self.native.set_log(on)

    def take_log(self) -> npt.NDArray[np.int32]:
        """(numbers,): records of distance, layer, token, count and so many experts; distance -1 is the router's choice,
        0, 1 and 2 what the routers of this and the next two layers choose from this layer's input."""
        return self.native.take_log()

    def close(self) -> None:
        """Stops the readers and frees the memory. Idempotent."""
        self._native = None


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of `data`."""
    return _kernels.crc32c(data)


def reader_bytes(slices: Sequence[Slice], experts: int) -> int:
    """Memory that the readers of a store with these take, beside its slots."""
    return READERS * _kernels.reader_bytes([piece._native() for piece in slices], experts)


def paging_fault() -> str | None:
    """Why experts cannot be paged with this llama.cpp; None where they can.

    The first call, which must come before the first model is loaded, hooks the stores in. From any thread.
    """
    with INSTALLING:
        return _installed()


@functools.cache
def _installed() -> str | None:
    kernels = packing_kernels()
    try:
        connect_host()
    except UnknownLibraryError as error:
        return f"llama.cpp is not the library that was expected ({error})"
    _kernels.install_experts(kernels)
    return None


@contextlib.contextmanager
def experts_in(store: ExpertStore | None) -> Iterator[None]:
    """While this is entered, expert tensors of models that this thread loads lie in `store`; None: in memory."""
    paging_fault()
    if store is None:
        yield
        return
    _kernels.set_expert_store(store.native)
    try:
        yield
    finally:
        _kernels.set_expert_store(None)
