"""Numbers to tables, and to one JSON object. A ratio is always ours over the rival's, taken round by round."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.measures import Cell, RoundResult
from bench.servers import Memory

OURS, RIVAL = "edgellm", "llama-server"
Results = dict[str, list[RoundResult]]  # of one model: contender's name -> its rounds
_MB = 1e6


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def median_of(rounds: Sequence[RoundResult], number: Callable[[RoundResult], float]) -> float:
    """Median over the rounds of one number of each."""
    return statistics.median(map(number, rounds))


def paired_ratios(results: Results, number: Callable[[RoundResult], float]) -> list[float]:
    """number(ours) / number(rival) of each round; empty if only one server ran."""
    pairs = zip(results.get(OURS, []), results.get(RIVAL, []), strict=False)
    return [number(ours) / number(rival) for ours, rival in pairs if number(rival)]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns line up."""
    grid = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in grid) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in grid
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def machine() -> dict[str, Any]:
    """Processor, cores, memory and kernel."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):  # x86; Arm boards
            cpu = line.partition(":")[2].strip()
            break
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    return {
        "cpu": cpu,
        "arch": platform.machine(),
        "cores": cores,
        "memory_bytes": memory_bytes,
        "kernel": platform.release(),
    }


def spread(ratios: Sequence[float]) -> str:
    """Median and range; a dash if there are none."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else "-"


def throughput_table(results: Results) -> str:
    """One row for each number of clients and server."""
    header = ["clients", "server", "tok/s", "ratio", "per stream", "TTFT p50 ms", "ratio", "p95 ms"]
    rows = []
    for clients in next(iter(results.values()))[0].cells:
        speed, ttft_s = at(clients, total_speed), at(clients, ttft_p50_s)
        for name, rounds in results.items():
            cells = [one.cells[clients] for one in rounds]
            wall_s = sum(cell.wall_s for cell in cells)
            rows.append(
                [
                    str(clients),
                    name,
                    f"{median_of(rounds, speed):.1f}",
                    spread(paired_ratios(results, speed)) if name == OURS else "",
                    f"{median_of(rounds, at(clients, stream_speed)):.1f}",
                    f"{median_of(rounds, ttft_s) * 1e3:.0f}",
                    spread(paired_ratios(results, ttft_s)) if name == OURS else "",
                    f"{percentile([one for cell in cells for one in cell.ttft_s], 0.95) * 1e3:.0f}",
                    f"{sum(cell.server_cpu_s for cell in cells) / wall_s:.2f}",
                    f"{sum(cell.client_cpu_s for cell in cells) / wall_s:.3f}",
                    f"{sum(cell.others_cpu_s for cell in cells) / wall_s:.2f}",
                ]
            )
    return table([*header, "server cores", "client cores", "other cores"], rows)


def others_cores(results: Results) -> float:
    """The most cores that anything but server and client kept busy during a cell."""
    cells = [cell for rounds in results.values() for one in rounds for cell in one.cells.values()]
    return max(cell.others_cpu_s / cell.wall_s for cell in cells)


def at(clients: int, number: Callable[[Cell], float]) -> Callable[[RoundResult], float]:
    """The number of the cell with that many clients."""
    return lambda one: number(one.cells[clients])


def total_speed(cell: Cell) -> float:
    """Answer tokens a second of all clients together."""
    return cell.total_tokens_per_s


def stream_speed(cell: Cell) -> float:
    """Tokens a second of one stream, after its first token."""
    return cell.stream_tokens_per_s


def ttft_p50_s(cell: Cell) -> float:
    """Median TTFT of one cell."""
    return statistics.median(cell.ttft_s)


Measure = tuple[str, str, Callable[[RoundResult], float], int]  # key, label with unit, number, decimals


def _further_measures() -> list[Measure]:
    def memory(key: str, label: str, of: Callable[[RoundResult], Memory]) -> list[Measure]:
        return [
            (f"{key}_rss_mb", f"RSS {label}, MB", lambda one: of(one).rss_bytes / _MB, 0),
            (f"{key}_pss_mb", f"PSS {label}, MB", lambda one: of(one).pss_bytes / _MB, 0),
        ]

    return [
        ("health_s", "start to /health ok, s", lambda one: one.startup.health_s, 2),
        ("first_answer_s", "start to first chat answer, s", lambda one: one.startup.first_answer_s, 2),
        ("turn_prompt_tokens", "second turn: prompt tokens", lambda one: one.second_turn.prompt_tokens, 0),
        ("turn_cold_ttft_ms", "second turn: cold TTFT, ms", lambda one: one.second_turn.cold_ttft_s * 1e3, 0),
        ("turn_warm_ttft_ms", "second turn: warm TTFT, ms", lambda one: one.second_turn.warm_ttft_s * 1e3, 0),
        ("turn_warm_over_cold", "second turn: warm / cold", warm_over_cold, 3),
        ("long_prompt_tokens", "long prompt: tokens", lambda one: one.long_prompt.prompt_tokens, 0),
        ("long_prompt_ttft_ms", "long prompt: TTFT, ms", lambda one: one.long_prompt.ttft_s * 1e3, 0),
        ("longest_gap_ms", "running stream: longest gap, ms", lambda one: one.long_prompt.longest_gap_s * 1e3, 0),
        ("usual_gap_ms", "running stream: usual gap, ms", lambda one: one.long_prompt.usual_gap_s * 1e3, 1),
        *memory("idle", "after the first answer", lambda one: one.idle),
        *memory("loaded", "after the load", lambda one: one.loaded),
        ("peak_rss_mb", "peak RSS, MB", lambda one: one.loaded.peak_rss_bytes / _MB, 0),
    ]


def warm_over_cold(one: RoundResult) -> float:
    """TTFT of the second turn over that of the same prompt never seen before."""
    return one.second_turn.warm_ttft_s / one.second_turn.cold_ttft_s


def further_table(results: Results) -> str:
    """Start, second turn, long prompt and memory: one row a measure."""
    rows = []
    for _, label, number, decimals in _further_measures():
        values = [f"{median_of(rounds, number):.{decimals}f}" for rounds in results.values()]
        rows.append([label, *values, spread(paired_ratios(results, number))])
    return table(["measure (median of rounds)", *results, "ratio (range)"], rows)


def targets(results: Results, bundled: bool) -> list[tuple[str, str, bool]]:
    """(target, measured, met) of what edgellm promises; empty unless both servers ran."""
    if set(results) != {OURS, RIVAL}:
        return []
    ours, rival = results[OURS], results[RIVAL]
    checks: list[tuple[str, float, bool]] = []
    for clients in ours[0].cells:
        least = 1.05 if clients == 1 else 1.0
        speed = statistics.median(paired_ratios(results, at(clients, total_speed)))
        checks.append((f"tok/s ratio at {clients} clients >= {least:.2f}", speed, speed >= least))
        ttft = statistics.median(paired_ratios(results, at(clients, ttft_p50_s)))
        checks.append((f"TTFT p50 ratio at {clients} clients <= 1.00", ttft, ttft <= 1.0))
    turn = median_of(ours, warm_over_cold)
    checks.append(("second turn's TTFT over a cold one <= 0.15", turn, turn <= 0.15))
    outside = outside_decode(ours)
    if outside is not None:
        checks.append(("loop outside llama_decode at 1 client <= 0.03", outside, outside <= 0.03))
    if bundled:
        ready_s = median_of(ours, lambda one: one.startup.first_answer_s)
        checks.append(("start to first answer, s <= 3", ready_s, ready_s <= 3))
    for label, state in (("after the first answer", "idle"), ("after the load", "loaded")):
        extra_mb = _rss_mb(ours, state) - _rss_mb(rival, state)
        checks.append((f"RSS {label} over the rival's, MB <= 120", extra_mb, extra_mb <= 120))
    return [(label, f"{value:.3f}" if abs(value) < 10 else f"{value:.0f}", met) for label, value, met in checks]


def _rss_mb(rounds: Sequence[RoundResult], state: str) -> float:
    return median_of(rounds, lambda one: (one.idle if state == "idle" else one.loaded).rss_bytes / _MB)


def outside_decode(rounds: Sequence[RoundResult]) -> float | None:
    """Median share of the engine's loop outside llama_decode at one client; None where it is not told."""
    shares = [one.cells[1].outside_decode for one in rounds if 1 in one.cells]
    told = [share for share in shares if share is not None]
    return statistics.median(told) if told else None


def same_answers(results: Results) -> float | None:
    """Share of greedy answers at the fewest clients that are the same text from both servers; None unless both ran."""
    if set(results) != {OURS, RIVAL}:
        return None
    fewest = min(results[OURS][0].cells)
    pairs = [
        pair
        for ours, rival in zip(results[OURS], results[RIVAL], strict=False)
        for pair in zip(ours.cells[fewest].texts, rival.cells[fewest].texts, strict=True)
    ]
    return sum(ours == rival for ours, rival in pairs) / len(pairs)


def as_json(results: Results) -> dict[str, Any]:
    """Medians and paired ratios of one model, keyed by name."""
    out: dict[str, Any] = {"same_answers": same_answers(results), "clients": {}, "outside_decode": None}
    if OURS in results:
        out["outside_decode"] = outside_decode(results[OURS])
    for clients in next(iter(results.values()))[0].cells:
        cell: dict[str, Any] = {}
        for key, number in _cell_numbers(clients).items():
            cell[key] = {name: round(median_of(rounds, number), 4) for name, rounds in results.items()}
            cell[key]["ratios"] = [round(ratio, 4) for ratio in paired_ratios(results, number)]
        out["clients"][str(clients)] = cell
    for key, _, number, _ in _further_measures():
        out[key] = {name: round(median_of(rounds, number), 4) for name, rounds in results.items()}
        out[key]["ratios"] = [round(ratio, 4) for ratio in paired_ratios(results, number)]
    return out


def _cell_numbers(clients: int) -> dict[str, Callable[[RoundResult], float]]:
    return {
        "total_tokens_per_s": at(clients, total_speed),
        "stream_tokens_per_s": at(clients, stream_speed),
        "ttft_p50_ms": at(clients, lambda cell: ttft_p50_s(cell) * 1e3),
        "ttft_p95_ms": at(clients, lambda cell: percentile(cell.ttft_s, 0.95) * 1e3),
        "server_cores": at(clients, lambda cell: cell.server_cpu_s / cell.wall_s),
        "client_cores": at(clients, lambda cell: cell.client_cpu_s / cell.wall_s),
        "other_cores": at(clients, lambda cell: cell.others_cpu_s / cell.wall_s),
    }
