"""How much memory a model will need, known before anything is allocated, and how much there is.

The estimate counts what a step really touches. llama.cpp also reserves address space for the logits of a whole chunk
(chunk_tokens * vocabulary * 4 bytes), of which only the rows asked for are ever written; that is not counted. Weights
are counted once, at the size they have when packed (kernels/packed.h): where llama.cpp itself rearranges them, the
file's pages remain mapped but can be dropped by the kernel.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from edgellm.models.describe import ModelInfo

_KV_ELEMENT_BYTES = 2  # f16
_F32_BYTES = 4
_CELLS_STEP = 256  # llama.cpp rounds the number of cells up to this
_VOCABULARY_ENTRY_BYTES = 400  # a token with its text, hash entries and merge in llama.cpp; measured 320 to 350
_PACKED_GROWTH = {"Q4_K": 64 / 2304, "Q5_K": 64 / 2816}  # scales of six bits take eight when packed
_FIXED_BYTES = 8 << 20  # graphs, batches and thread stacks
_BATCH_OUTPUTS = 2  # logits stand in the graph's buffer and in the output buffer


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """All in bytes. `kv_bytes` includes recurrent state."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    prefix_bytes: int = 0  # at most: finished sequences that were moved out of the KV cells
    expert_bytes: int | None = None  # at most: experts of a paged model, which `weights_bytes` then leaves out

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.prefix_bytes + (self.expert_bytes or 0)


def whole_cells(context_tokens: int) -> int:
    """How many KV cells llama.cpp makes for a context of so many tokens."""
    return -(-max(context_tokens, 1) // _CELLS_STEP) * _CELLS_STEP


def estimate_memory(
    info: ModelInfo, context_tokens: int, sequences: int, chunk_tokens: int, *, flash_attention: bool = True
) -> MemoryEstimate:
    """An upper estimate for one context of `info` with `context_tokens` KV cells shared by `sequences`.

    KV: f16 keys and values of every layer with attention; sliding windows are ignored: their layers keep all
    cells as well. Recurrent state: f32, for each sequence. Compute: the activations of one chunk (eight rows of the
    model's width and four of its feed-forward width for each token), the attention mask, the scores where flash
    attention is off, and two copies of one row of logits for each sequence.
    """
    cells = whole_cells(context_tokens)
    chunk = min(chunk_tokens, cells)
    kv = cells * sum(info.kv_heads) * (info.key_width + info.value_width) * _KV_ELEMENT_BYTES
    if not info.causal:
        kv = 0  # encoders attend within the batch and keep no cache
    if info.state:
        kv += sequences * info.state.layers * (info.state.conv_elements + info.state.state_elements) * _F32_BYTES
    inner = info.feed_forward_width * max(info.experts_used, 1)
    row = 8 * info.embedding_width + 4 * inner + 4 * info.heads * info.key_width
    if info.state and info.state.layers:
        row += 4 * (info.state.conv_elements + info.state.state_elements)
    compute = chunk * row * _F32_BYTES
    compute += chunk * cells * _F32_BYTES * (1 if flash_attention else 1 + info.heads)
    compute += _BATCH_OUTPUTS * sequences * max(info.vocabulary, info.embedding_width) * _F32_BYTES
    growth = sum(size * _PACKED_GROWTH.get(kind, 0) for kind, size in info.matrix_bytes.items())
    return MemoryEstimate(
        weights_bytes=info.tensor_bytes + int(growth) + info.vocabulary * _VOCABULARY_ENTRY_BYTES,
        kv_bytes=kv,
        compute_bytes=compute + _FIXED_BYTES,
    )


def available_memory_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory this process may still take, in bytes: the least of what the kernel has and what its control groups allow.

    Linux: MemAvailable, and the headroom of every memory cgroup above the process (v1 and v2; cached file pages count
    as free). Elsewhere: free physical memory where sysconf tells it, else half of the physical memory.
    """
    limits = [headroom for folder in _cgroup_folders(proc, cgroups) if (headroom := _headroom(folder)) is not None]
    return max(0, min([_system_bytes(proc), *limits]))


def _system_bytes(proc: Path) -> int:
    try:
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    page = os.sysconf("SC_PAGE_SIZE")
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * page
    return os.sysconf("SC_PHYS_PAGES") * page // 2


def _cgroup_folders(proc: Path, cgroups: Path) -> list[Path]:
    """Directories of the memory cgroups that hold this process, innermost first."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, inside = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = cgroups / "memory" if controllers else cgroups
        # In a container the path may be the host's, and only the mount itself be visible.
        parts = [part for part in inside.split("/") if part not in ("", "..")]
        folders += [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return folders


def _headroom(folder: Path) -> int | None:
    """Limit minus use without file cache, in bytes; None if this group has no limit."""
    for limit_file, used_file, cache_key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = int((folder / limit_file).read_text())
            used = int((folder / used_file).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        return limit - used + _stat(folder / "memory.stat", cache_key)
    return None


def _stat(path: Path, key: str) -> int:
    try:
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    except (OSError, ValueError):
        pass
    return 0
