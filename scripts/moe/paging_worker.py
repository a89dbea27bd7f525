"""One measurement of scripts/bench_moe, in a process of its own: reads a prompt, then text token by token.

Arguments: one JSON object (Task). Prints one JSON object (Measured) as its last line.
"""

from __future__ import annotations

import contextlib
import ctypes
import gzip
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from edgellm.backend.batch import Batch
from edgellm.backend.context import Context, ContextParams, EvalCallback
from edgellm.backend.experts import ExpertStats
from edgellm.backend.host import Tensor
from edgellm.backend.library import lib
from edgellm.backend.model import Model
from edgellm.engine.threads import default_threads
from edgellm.moe.layout import read_layout
from edgellm.moe.pager import Pager, load_paged

ROWS = 256  # of a step
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.POINTER(Tensor), ctypes.c_bool, ctypes.c_void_p)


@dataclass(frozen=True, slots=True)
class Task:
    """`way`: "paged", "table" (paged, look-ahead by the table: its routers are withheld), "unforeseen" (paged without
    look-ahead) or "mmap" (llama.cpp's)."""

    model: str
    text: str
    way: str
    home: str
    budget_bytes: int = 0
    cgroup: str = ""
    prompt_tokens: int = 64
    tokens: int = 128
    most_seconds: float = 90.0
    packed: bool = True
    log_routes: bool = False
    routes: str = ""  # a .npy file, (tokens, layers, used): in place of the routers' choice
    foreseen: str = ""  # the same, of look-ahead


@dataclass(slots=True)
class Measured:
    """Seconds are wall time; "late" figures are those of the second half of the tokens."""

    load_s: float = 0.0
    prompt_s: float = 0.0
    tokens: int = 0
    tokens_per_s: float = 0.0
    late_tokens_per_s: float = 0.0
    p5_ms: float = 0.0
    p95_ms: float = 0.0
    peak_rss_bytes: int = 0
    held_bytes: int = 0  # of that, by experts
    major_faults: int = 0
    late_disk_bytes: float = 0.0  # a token, as the kernel counts it
    late_hit_rate: float = 0.0
    late_expert_bytes: float = 0.0  # a token
    late_stall_ms: float = 0.0  # a token
    ahead_share: float = 0.0  # of the steps that read ahead
    prefetched: int = 0
    prefetch_used: int = 0
    log: list[int] = field(default_factory=list)
    log_prompt_numbers: int = 0  # of the log, that are the prompt's


class _Routed:
    """llama.cpp's own routers overruled: what they chose is overwritten before it is used."""

    def __init__(self, blocks: tuple[int, ...]) -> None:
        self._layers = {f"ffn_moe_topk-{block}": layer for layer, block in enumerate(blocks)}
        self.route: np.ndarray | None = None  # (layers, used) of the step
        self._function = _CALLBACK(self._on_node)
        self.callback = EvalCallback(ctypes.cast(self._function, ctypes.c_void_p).value or 0)

    def _on_node(self, node: ctypes._Pointer[Tensor], ask: bool, _data: object) -> bool:
        layer = self._layers.get(node.contents.name.decode())
        if layer is None or self.route is None:
            return not ask
        if not ask:
            used = self.route.shape[1]
            ids = (ctypes.c_int32 * used).from_address(node.contents.data)
            ids[:] = self.route[layer].tolist()
        return True


def _open(task: Task) -> tuple[Model, Pager | None, _Routed | None]:
    path = Path(task.model)
    layout = read_layout(path, packed=task.packed)
    if layout is None:
        raise SystemExit(f"{path} has no experts")
    if task.way == "mmap":
        with _no_repacking():
            return Model(path), None, _Routed(layout.blocks) if task.routes else None
    model = load_paged(layout, task.budget_bytes, Path(task.home), packed=task.packed)
    if model.experts is None:
        raise SystemExit("the model is not paged")
    pager = Pager(model.experts, layout, Path(tempfile.mkdtemp(dir=task.home)) / "routing.npy")
    if task.way == "table":
        none = np.zeros(0, np.float32)
        model.experts.set_routers([(none, none, none, False)] * layout.layers, layout.experts_used or 1, 1)
    if task.way == "unforeseen":
        pager.price.on = False
        model.experts.read_ahead(False)
    return model, pager, None


@contextlib.contextmanager
def _no_repacking() -> Iterator[None]:
    """llama.cpp's other layouts copy the experts into memory when they are loaded: none of them is mapped then."""
    low = lib()
    usual = low.llama_model_default_params

    def plain() -> object:
        params = usual()
        params.use_extra_bufts = False
        return params

    low.llama_model_default_params = plain
    try:
        yield
    finally:
        low.llama_model_default_params = usual


def measure(task: Task) -> Measured:
    if task.cgroup:
        (Path(task.cgroup) / "cgroup.procs").write_text(str(os.getpid()))
    found = Measured()
    started = time.perf_counter()
    model, pager, routed = _open(task)
    callback = routed.callback if routed else None
    params = ContextParams(
        2048, sequences=1, batch_tokens=ROWS, outputs=1, threads=default_threads(), eval_callback=callback
    )
    context = Context(model, params)
    found.load_s = time.perf_counter() - started
    raw = Path(task.text).read_bytes()
    text = (gzip.decompress(raw) if task.text.endswith(".gz") else raw).decode("utf-8", "replace")
    ids = model.vocab.tokenize(text[: 64 * (task.prompt_tokens + task.tokens)], add_special=False, parse_special=False)
    batch, started = Batch(ROWS), time.perf_counter()
    if pager and task.log_routes:
        pager.store.log_routes(True)
    for start in range(0, task.prompt_tokens, ROWS):
        batch.clear()
        batch.extend(ids[start : min(start + ROWS, task.prompt_tokens)], start, 0, outputs=0)
        context.decode(batch)
    found.prompt_s = time.perf_counter() - started
    if pager and task.log_routes:
        found.log = pager.store.take_log().tolist()
        found.log_prompt_numbers = len(found.log)
    _decode(task, context, pager, routed, ids, found)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found.peak_rss_bytes, found.major_faults = usage.ru_maxrss * 1024, usage.ru_majflt
    found.held_bytes = pager.store.resident_bytes if pager else 0
    context.close()
    model.close()
    return found


def _decode(
    task: Task, context: Context, pager: Pager | None, routed: _Routed | None, ids: list[int], found: Measured
) -> None:
    routes = np.load(task.routes) if task.routes else None
    foreseen = np.load(task.foreseen) if task.foreseen and task.way == "paged" else None
    batch, seconds, ahead = Batch(1), [], 0
    half, disk, began = (pager.store.stats if pager else None), _disk_bytes(), time.perf_counter()
    for number in range(task.tokens):
        if number == task.tokens // 2:
            half, disk, late = (pager.store.stats if pager else None), _disk_bytes(), number
        if routes is not None and pager:
            seen = foreseen[number % len(foreseen)].ravel().tolist() if foreseen is not None else []
            pager.store.set_route(routes[number % len(routes)].ravel().tolist(), seen)
        elif routes is not None and routed:
            routed.route = routes[number % len(routes)]
        batch.clear()
        batch.extend([ids[task.prompt_tokens + number]], task.prompt_tokens + number, 0, outputs=1)
        started = time.perf_counter()
        context.decode(batch)
        seconds.append(time.perf_counter() - started)
        if pager:
            ahead += pager.price.on
            if task.way in ("paged", "table"):
                pager.after_step(seconds[-1], 1)
        if time.perf_counter() - began > task.most_seconds and number >= 7:
            break
    late = task.tokens // 2 if len(seconds) > task.tokens // 2 + 1 else 0
    _fill_in(found, seconds, late, (_disk_bytes() - disk) / (len(seconds) - late))
    found.ahead_share = ahead / len(seconds)
    if pager and half:
        _count(found, half, pager.store.stats, len(seconds) - late)
        found.log += pager.store.take_log().tolist() if task.log_routes else []


def _fill_in(found: Measured, seconds: list[float], late: int, disk_bytes: float) -> None:
    found.tokens = len(seconds)
    found.tokens_per_s = len(seconds) / sum(seconds)
    found.late_tokens_per_s = (len(seconds) - late) / sum(seconds[late:])
    found.p5_ms, found.p95_ms = (float(np.percentile(seconds[late:], share)) * 1e3 for share in (5, 95))
    found.late_disk_bytes = disk_bytes


def _count(found: Measured, half: ExpertStats, end: ExpertStats, tokens: int) -> None:
    found.late_hit_rate = (end.hits - half.hits) / max(1, end.needed - half.needed)
    found.late_expert_bytes = (end.bytes - half.bytes) / tokens
    found.late_stall_ms = (end.stall_ns - half.stall_ns) / tokens / 1e6
    found.prefetched, found.prefetch_used = end.prefetched - half.prefetched, end.prefetch_used - half.prefetch_used


def _disk_bytes() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return 0


if __name__ == "__main__":
    print(json.dumps(asdict(measure(Task(**json.loads(sys.argv[1]))))))
