"""Where the experts of a MoE model are in its files, and how much memory some or all of them take."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgellm.backend.experts import Slice, reader_bytes
from edgellm.errors import InvalidModelFileError, ModelTooLargeError, ModelUnsupportedError
from edgellm.models.gguf import GGUFHeader, TensorInfo, read_header
from edgellm.models.packs import PACK_TENSOR, STACKED_EXPERTS, is_pack, read_pack
from edgellm.models.sanity import MAX_EXPERTS
from edgellm.models.split import split_headers
from edgellm.moe.pair_table import state_bytes
from edgellm.moe.records import MULTIPLICATION_ORDER, lay_out_records, place_of

_SEPARATE = re.compile(r"blk\.\d+\.ffn_(up|gate|down)\.\d+\.weight")  # Mixtral files of 2023
_STREAM_SHARE = 16  # the streaming area takes at most this part of a budget, beyond the least
_STREAM_BYTES = 32 << 20  # and at most this: what keeps several reads going
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """The stacked expert tensors of a model. MoE layers count from 0."""

    files: tuple[Path, ...]
    slices: tuple[Slice, ...]  # layer by layer, in the order in which they are multiplied by
    blocks: tuple[int, ...]  # (layers,): the model's block that each MoE layer is in
    experts: int  # of a layer
    experts_used: int  # for each token; 0 if the file does not say
    pools: tuple[int, ...]  # (layers,): layers whose experts take the same memory share a pool
    slot_bytes: tuple[int, ...]  # (pools,): memory of one expert
    read_bytes: tuple[int, ...]  # (layers,): what reading one expert reads; of a pack, in the middle
    headers: tuple[GGUFHeader, ...] = field(repr=False, compare=False)  # (files,): read once for all of a load

    @property
    def name(self) -> str:
        """Of the first file, as it was named."""
        return self.headers[0].path.name

    @property
    def layers(self) -> int:
        return len(self.blocks)

    @property
    def reading_bytes(self) -> int:
        """Memory that the readers take to rearrange experts, and the table of which follow which."""
        return reader_bytes(self.slices, self.experts) + state_bytes(self.layers, self.experts)

    @property
    def least_bytes(self) -> int:
        """The least budget: two matrices at a time are streamed, and no expert stays."""
        return 2 * max(piece.extent_bytes for piece in self.slices) + self.reading_bytes

    @property
    def whole_bytes(self) -> int:
        """The budget with which every expert stays."""
        return self.reading_bytes + sum(self.slot_bytes[pool] * self.experts for pool in self.pools)

    @property
    def all_read_bytes(self) -> int:
        """Bytes of all experts in the files."""
        return self.experts * sum(self.read_bytes)


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """How a budget is used. `slots[pool]` experts stay; `stream_bytes` is for those that find no slot."""

    slots: tuple[int, ...]
    stream_bytes: int
    total_bytes: int  # most memory it all takes


def read_layout(path: Path, *, packed: bool = True) -> ExpertLayout | None:
    """The experts of the model whose (first) file is `path`; None if it has none.

    `packed`: they are rearranged for this processor on their way into memory, where they can be.

    Raises ModelUnsupportedError for experts that are not stacked, or not as many in every layer as the file says, and
    what `read_header` and `split_headers` raise.
    """
    headers = split_headers(read_header(path))
    if is_pack(headers[0]):
        return _layout(headers, _packed(headers[0], packed))
    found: dict[int, list[tuple[int, Slice, int]]] = {}
    for file, header in enumerate(headers):
        for tensor in header.tensors:
            if _SEPARATE.fullmatch(tensor.name):
                raise ModelUnsupportedError(
                    f"{path.name}: its experts are tensors of their own ({tensor.name}), as in files of 2023; only "
                    "stacked ones can be paged, and llama.cpp no longer loads others. Convert the model anew"
                )
            if match := STACKED_EXPERTS.fullmatch(tensor.name):
                piece, experts = _slice(tensor, file, header.data_offset, packed)
                found.setdefault(int(match[1]), []).append((MULTIPLICATION_ORDER.index(match[2]), piece, experts))
    return _layout(headers, found) if found else None


def _slice(tensor: TensorInfo, file: int, data_offset: int, packed: bool) -> tuple[Slice, int]:
    """The tensor, and how many experts are stacked in it. Its layer is filled in later."""
    if len(tensor.dims) != 3:
        raise ModelUnsupportedError(f"{tensor.name} has {len(tensor.dims)} dimensions, and not one for the experts")
    columns, rows, experts = tensor.dims
    piece = Slice(
        tensor.name,
        tensor.type.code,
        tensor.type.name,
        columns,
        rows,
        layer=-1,
        file=file,
        offset=data_offset + tensor.offset,
        n_bytes=tensor.n_bytes // experts,
        may_pack=packed,
    )
    return piece, experts


def _packed(header: GGUFHeader, packed: bool) -> dict[int, list[tuple[int, Slice, int]]]:
    """The stacked tensors of a pack, whose matrices lie in its records."""
    content = read_pack(header)
    places = {int(match[1]): tensor for tensor in header.tensors if (match := PACK_TENSOR.fullmatch(tensor.name))}
    found: dict[int, list[tuple[int, Slice, int]]] = {}
    for block, widths in zip(sorted(places), content.widths, strict=True):
        records = lay_out_records([tensor for tensor in content.stacked if place_of(tensor)[0] == block], widths)
        if records.n_bytes != places[block].n_bytes:
            raise InvalidModelFileError(
                f"{header.path.name}: {places[block].name} has {places[block].n_bytes} bytes, not {records.n_bytes}"
            )
        start = header.data_offset + places[block].offset
        for number, tensor in enumerate(records.tensors):
            piece, experts = _slice(tensor, 0, 0, packed)
            offsets = tuple(start + int(offset) for offset in records.offsets[number])
            piece = replace(piece, offsets=offsets, widths=records.widths[number].tobytes())
            found.setdefault(block, []).append((place_of(tensor)[1], piece, experts))
    return found


def _layout(headers: tuple[GGUFHeader, ...], found: dict[int, list[tuple[int, Slice, int]]]) -> ExpertLayout:
    counts = {experts for pieces in found.values() for _, _, experts in pieces}
    if len(counts) != 1:
        raise ModelUnsupportedError(f"{headers[0].path.name}: its layers have different numbers of experts")
    if max(counts) > MAX_EXPERTS:
        raise ModelUnsupportedError(f"{headers[0].path.name}: its layers have more than {MAX_EXPERTS} experts")
    experts, said = counts.pop(), _whole(_own(headers[0], "expert_count"))
    if said and said != experts:
        raise ModelUnsupportedError(
            f"{headers[0].path.name}: its tensors have {experts} experts in a layer, but it says {said}"
        )
    slices: list[Slice] = []
    pools: list[int] = []
    kinds: dict[tuple[int, ...], int] = {}
    read_bytes: list[int] = []
    for layer, block in enumerate(sorted(found)):
        pieces = [piece.of_layer(layer) for _, piece, _ in sorted(found[block], key=lambda item: item[0])]
        extents = tuple(piece.extent_bytes for piece in pieces)
        slices += pieces
        pools.append(kinds.setdefault(extents, len(kinds)))
        read_bytes.append(sum(piece.stored_bytes(expert) for piece in pieces for expert in range(experts)) // experts)
    return ExpertLayout(
        files=tuple(header.path.resolve() for header in headers),
        slices=tuple(slices),
        blocks=tuple(sorted(found)),
        experts=experts,
        experts_used=_experts_used(headers[0]),
        pools=tuple(pools),
        slot_bytes=tuple(sum(extents) for extents in kinds),
        read_bytes=tuple(read_bytes),
        headers=headers,
    )


def _own(header: GGUFHeader, key: str) -> object:
    """Metadata under the architecture's name."""
    return header.metadata.get(f"{header.metadata.get('general.architecture')}.{key}")


def _experts_used(header: GGUFHeader) -> int:
    used = _own(header, "expert_used_count")
    return max((item for item in used if isinstance(item, int)), default=0) if isinstance(used, tuple) else _whole(used)


def _whole(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def plan_experts(layout: ExpertLayout, budget_bytes: int) -> ExpertPlan:
    """How `budget_bytes` of memory are best used. Raises ModelTooLargeError if they are less than the least."""
    if budget_bytes >= layout.whole_bytes:
        slots = tuple(_members(layout.pools, pool) * layout.experts for pool in range(len(layout.slot_bytes)))
        return ExpertPlan(slots, layout.least_bytes, layout.whole_bytes)  # the streaming area is never touched
    least = layout.least_bytes
    if budget_bytes < least:
        raise ModelTooLargeError(
            f"the experts need at least {-(-least // _MIB)} MiB of memory, but may take {budget_bytes // _MIB} MiB",
            needed_bytes=least,
            budget_bytes=budget_bytes,
        )
    rest = budget_bytes - layout.reading_bytes
    smallest = least - layout.reading_bytes
    stream = max(smallest, min(_STREAM_BYTES, rest // _STREAM_SHARE))
    share = (rest - stream) / (layout.whole_bytes - layout.reading_bytes)
    slots = tuple(int(_members(layout.pools, pool) * layout.experts * share) for pool in range(len(layout.slot_bytes)))
    return ExpertPlan(slots, stream, budget_bytes)


def _members(pools: Iterable[int], pool: int) -> int:
    return sum(1 for other in pools if other == pool)
