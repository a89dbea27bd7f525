"""The prefix cache: what each sequence id holds, live or idle, and which of it a new prompt can continue from.

Policy only. The cache acts through a `Memory` (in production a `backend.Context`), so it is tested without a model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from edgellm.backend.context import Bytes
from edgellm.engine.cells import CellLedger
from edgellm.engine.types import AdapterUse

AdapterSet = tuple[AdapterUse, ...]

_COMPARE_BLOCK = 256
_SCATTERED_CELLS = 512
_WORTH_SAVING_TOKENS = 64  # shorter prompts are computed again about as fast as they are brought back


class Memory(Protocol):
    """The part of a context that moves cached positions."""

    def remove(self, sequence: int, start: int = 0, end: int = -1) -> bool: ...

    def copy(self, source: int, target: int, end: int) -> None: ...

    def saved_bytes(self, sequence: int) -> int: ...

    def first_position(self, sequence: int) -> int: ...

    def save(self, sequence: int) -> Bytes: ...

    def load(self, sequence: int, data: Bytes) -> bool: ...


@dataclass(slots=True, eq=False)
class Entry:
    """One sequence id and the tokens whose keys and values it holds."""

    sequence: int
    adapters: AdapterSet
    tokens: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)  # parallel to tokens


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """A finished sequence that was moved out of the KV cells into ordinary memory."""

    adapters: AdapterSet
    tokens: list[int]
    data: Bytes


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common prefix. Compares slices, which is done in C, then the block that differs."""
    limit = min(len(left), len(right))
    start = 0
    while start < limit and left[start : start + _COMPARE_BLOCK] == right[start : start + _COMPARE_BLOCK]:
        start += _COMPARE_BLOCK
    start = min(start, limit)
    while start < limit and left[start] == right[start]:
        start += 1
    return start


class PrefixCache:
    """Hands out sequence ids, remembers finished sequences, and evicts the least recently used when cells run short.

    `idle_cells` bounds what finished sequences may keep in the KV cells: attention scans every cell up to the highest
    one in use, so remembering more there costs every running sequence time. What goes out is copied to ordinary memory,
    up to `saved_bytes`, and brought back when a prompt continues it.
    """

    def __init__(
        self,
        memory: Memory,
        capacity: int,
        *,
        sequences: int,
        idle_cells: int,
        saved_bytes: int = 0,
        can_roll_back: bool = True,
        window: int = 0,
    ) -> None:
        """`window`: attention of some layers reaches only so many tokens back, and what lies further back may be gone
        from the cells; 0: it reaches all of them."""
        self._memory = memory
        self._can_roll_back = can_roll_back
        self._window = window
        self._whole_only = window > 0 or not can_roll_back  # what was saved can be continued at its end only
        self._idle_cells = idle_cells
        self._free_ids = list(range(sequences - 1, -1, -1))
        self._live: dict[int, Entry] = {}
        self._idle: OrderedDict[int, Entry] = OrderedDict()  # least recently used first
        self._saved: list[Saved] = []  # least recently used first
        self._saved_limit = saved_bytes
        self._peak = 0  # most cells in use since the cache was last empty: no cell beyond has been touched
        self.ledger = CellLedger(capacity)
        self.lookups = 0
        self.hits = 0  # lookups that found some prefix

    @property
    def evictable(self) -> int:
        """Cells that evicting every idle entry would free, at least."""
        live = {cell for entry in self._live.values() for cell in entry.cells} if self._idle else set()
        return len({cell for entry in self._idle.values() for cell in entry.cells} - live)

    @property
    def idle_entries(self) -> int:
        """Finished sequences that are remembered."""
        return len(self._idle)

    def acquire(self, tokens: Sequence[int], adapters: AdapterSet) -> Entry:
        """An entry for a sequence that will compute `tokens`, holding the longest cached prefix of it.

        At least one token is left to compute, for its logits. Other finished sequences leave the cells for ordinary
        memory, so that attention does not scan them for as long as this one runs.
        """
        entry = self._acquire(tokens, adapters)
        self._move_out(beside=entry)
        return entry

    def _acquire(self, tokens: Sequence[int], adapters: AdapterSet) -> Entry:
        usable = list(tokens[:-1])
        source, length = self._longest(usable, adapters)
        self.lookups += 1
        entry = self._restore(usable, adapters, length)
        if entry is not None:
            self.hits += 1
            self._live[entry.sequence] = entry
            return entry
        if source is not None and length and not source.tokens:  # evicted to make room, in vain
            source, length = self._longest(usable, adapters)
        self.hits += length > 0
        if source is not None and length == len(source.tokens) and source.sequence in self._idle:
            entry = self._idle.pop(source.sequence)  # continued where it ended: no copy needed
        else:
            entry = Entry(self._take_id(keep=source), adapters)
            if source is not None and length:
                self._share(source, entry, length)
        self._live[entry.sequence] = entry
        return entry

    def fork(self, source: Entry) -> Entry:
        """A new live entry that shares all of `source`: for the further answers to one prompt."""
        entry = Entry(self._take_id(keep=source), source.adapters)
        self._share(source, entry, len(source.tokens))
        self._live[entry.sequence] = entry
        return entry

    def reserve(self, count: int) -> bool:
        """Makes `count` cells free, evicting idle entries as needed. False if even that is not enough."""
        while self.ledger.free < count and self._idle:
            self._evict_oldest()
        return self.ledger.free >= count

    def append(self, entry: Entry, tokens: Sequence[int]) -> None:
        """Records that `tokens` are about to be computed for `entry`; `reserve` first."""
        entry.cells += self.ledger.allocate(len(tokens))
        entry.tokens += tokens
        self._peak = max(self._peak, self.ledger.used)

    def truncate(self, entry: Entry, length: int) -> None:
        """Drops the positions of `entry` from `length` on: rejected drafts. Only where the model can roll back."""
        if length < len(entry.tokens):
            self._memory.remove(entry.sequence, length, -1)
            self.ledger.release(entry.cells[length:])
            del entry.cells[length:], entry.tokens[length:]

    def retire(self, entry: Entry) -> None:
        """The sequence is over; what it holds stays for later prompts while there is room."""
        del self._live[entry.sequence]
        if not entry.tokens:
            self._forget(entry)
            return
        self._idle[entry.sequence] = entry
        while len(self._idle) > 1 and sum(len(idle.cells) for idle in self._idle.values()) > self._idle_cells:
            self._evict_oldest()

    def settle(self) -> None:
        """Call when nothing is running. Finished sequences that lie scattered, because there were others around them,
        move out of the cells: one at a high place makes attention scan all the way up to it."""
        if not self._live and self._idle and self._peak > self.ledger.used + _SCATTERED_CELLS:
            self._move_out()
        if not self.ledger.used:
            self._peak = 0

    @property
    def saved_bytes(self) -> int:
        """Ordinary memory that finished sequences take."""
        return sum(saved.data.nbytes for saved in self._saved)

    def discard(self, entry: Entry) -> None:
        """The sequence leaves and frees its cells at once: preemption, failure, or a withdrawn adapter."""
        self._live.pop(entry.sequence, None)
        self._idle.pop(entry.sequence, None)
        self._forget(entry)

    def drop_adapter(self, name: str) -> None:
        """Forgets idle entries made with the adapter `name`: the name may come to mean another file."""
        for entry in [e for e in self._idle.values() if any(use.name == name for use in e.adapters)]:
            self.discard(entry)
        self._saved = [saved for saved in self._saved if all(use.name != name for use in saved.adapters)]

    def _longest(self, tokens: list[int], adapters: AdapterSet) -> tuple[Entry | None, int]:
        best: Entry | None = None
        best_length = 0
        for entry in (*self._live.values(), *self._idle.values()):
            if entry.adapters != adapters:
                continue
            length = common_prefix(entry.tokens, tokens)
            if not self._can_roll_back and (length < len(entry.tokens) or entry.sequence in self._live):
                continue  # a recurrent state can only be continued from its end, and belongs to one sequence
            if self._window and length < len(entry.tokens) and not self._holds_window(entry, length):
                continue
            if length > best_length or (length == best_length and best is not None and length == len(entry.tokens)):
                best, best_length = entry, length
        return best, best_length

    def _holds_window(self, entry: Entry, length: int) -> bool:
        """Whether all that the token after the first `length` attends to is still there."""
        return self._memory.first_position(entry.sequence) <= max(0, length - self._window)

    def _restore(self, tokens: list[int], adapters: AdapterSet, in_cells: int) -> Entry | None:
        """Brings back the saved sequence that shares the longest prefix with `tokens`, if that is worth it: clearly
        longer than the `in_cells` tokens that the cells offer already."""
        candidates = [(common_prefix(s.tokens, tokens), s) for s in self._saved if s.adapters == adapters]
        if self._whole_only:
            candidates = [(length, saved) for length, saved in candidates if length == len(saved.tokens)]
        length, saved = max(candidates, key=lambda pair: pair[0], default=(0, None))
        if saved is None or length < in_cells + _WORTH_SAVING_TOKENS:
            return None
        if not self.reserve(len(saved.tokens)):
            return None
        entry = Entry(self._take_id(keep=None), adapters)
        if not self._memory.load(entry.sequence, saved.data):
            self._forget(entry)  # the free cells lie scattered
            return None
        self.append(entry, saved.tokens)
        self.truncate(entry, length)
        if saved in self._saved:  # making room may have pushed it out
            self._saved.remove(saved)
            if length < len(saved.tokens):
                self._saved.append(saved)  # something else may continue the rest of it
        return entry

    def _save(self, entry: Entry) -> bool:
        """Copies what `entry` holds to ordinary memory. False if it is too short, or larger than all that there is."""
        if len(entry.tokens) < _WORTH_SAVING_TOKENS or not self._saved_limit:
            return False
        mine = [saved for saved in self._saved if saved.adapters == entry.adapters]
        covering = next((saved for saved in mine if self._covers(saved.tokens, entry.tokens)), None)
        if covering is not None:
            self._saved.remove(covering)
            self._saved.append(covering)
            return True
        if self._memory.saved_bytes(entry.sequence) > self._saved_limit:
            return False
        data = self._memory.save(entry.sequence)
        covered = [saved for saved in mine if self._covers(entry.tokens, saved.tokens)]
        self._saved = [saved for saved in self._saved if saved not in covered]
        self._saved.append(Saved(entry.adapters, list(entry.tokens), data))
        while self.saved_bytes > self._saved_limit:
            self._saved.pop(0)
        return True

    def _move_out(self, beside: Entry | None = None) -> None:
        """Moves finished sequences to ordinary memory, but those that are too large for it, and those that have half of
        their cells in common with `beside`: another prompt with the same long beginning may follow."""
        for entry in tuple(self._idle.values()) if self._saved_limit else ():
            middle = len(entry.cells) // 2
            if beside is not None and entry.cells[middle] in beside.cells[middle : middle + 1]:
                continue
            if self._save(entry) or len(entry.tokens) < _WORTH_SAVING_TOKENS:
                self.discard(entry)

    def _covers(self, longer: list[int], shorter: list[int]) -> bool:
        """Whether what holds `longer` can stand in for what holds `shorter`."""
        if self._whole_only:
            return longer == shorter
        return common_prefix(longer, shorter) == len(shorter)

    def _share(self, source: Entry, target: Entry, length: int) -> None:
        self._memory.copy(source.sequence, target.sequence, length)
        target.tokens = source.tokens[:length]
        target.cells = source.cells[:length]
        self.ledger.share(target.cells)
        if source.sequence in self._idle:
            self._idle.move_to_end(source.sequence)

    def _take_id(self, keep: Entry | None) -> int:
        if not self._free_ids:
            oldest = next(entry for entry in self._idle.values() if entry is not keep)
            self._save(oldest)
            self.discard(oldest)
        return self._free_ids.pop()

    def _evict_oldest(self) -> None:
        _, entry = self._idle.popitem(last=False)
        self._save(entry)
        self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        self._memory.remove(entry.sequence, 0, -1)
        self.ledger.release(entry.cells)
        entry.cells.clear()
        entry.tokens.clear()
        self._free_ids.append(entry.sequence)
