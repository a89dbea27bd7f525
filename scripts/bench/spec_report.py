"""What scripts/bench_spec prints. A ratio is a drafting side's over the same server's without, round by round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench.report import spread, table
from bench.spec_assisted import Assisted, AssistedRun, median_ratio, speeds
from bench.spec_identity import Fork, noise_limit, unexplained
from bench.spec_runs import OURS, Cell, Counts, Results, Side

_FORKS_SHOWN = 40


def median_of(cells: Sequence[Cell], number: Callable[[Cell], float]) -> float:
    """Over the rounds."""
    return statistics.median(map(number, cells))


def ratios(sides: dict[str, list[Cell]], one: str, other: str, number: Callable[[Cell], float]) -> list[float]:
    """number(one) / number(other) of each round; empty where either is missing."""
    pairs = zip(sides.get(one, []), sides.get(other, []), strict=False)
    return [number(a) / number(b) for a, b in pairs if number(b)]


def speed(cell: Cell) -> float:
    """Answer tokens a second of all clients together."""
    return cell.tokens_per_s


def ttft_ms(cell: Cell) -> float:
    """Median TTFT."""
    return cell.ttft_s * 1e3


def drafts_of(cells: Sequence[Cell]) -> Counts:
    """Of all rounds together."""
    return Counts(sum(cell.drafts.accepted for cell in cells), sum(cell.drafts.rejected for cell in cells))


def proposers_of(cells: Sequence[Cell]) -> dict[str, Counts]:
    """Of all rounds together, by proposer."""
    sums: dict[str, Counts] = {}
    for cell in cells:
        for name, counts in cell.proposers.items():
            of = sums.setdefault(name, Counts())
            of.accepted, of.rejected = of.accepted + counts.accepted, of.rejected + counts.rejected
    return sums


def same_texts(sides: dict[str, list[Cell]], one: str, other: str) -> float | None:
    """Share of answers whose texts are the same; None where either side is missing."""
    cells = zip(sides.get(one, []), sides.get(other, []), strict=False)
    pairs = [(a.text, b.text) for x, y in cells for a, b in zip(x.answers, y.answers, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else None


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def drafting(results: Results, sides: Sequence[Side]) -> Iterator[tuple[str, int, Side, str, dict[str, list[Cell]]]]:
    """(workload, clients, drafting side, its base, all cells there) of what was measured."""
    for (workload, clients), cells in results.items():
        for side in sides:
            if side.base is not None and cells.get(side.name) and cells.get(side.base):
                yield workload, clients, side, side.base, cells


def speed_table(results: Results, sides: Sequence[Side], family: str) -> str | None:
    """Each drafting side of one server beside its base; None if there is none. Rivals also beside our first side."""
    ours = next((side.name for side in sides if side.base == OURS), None)
    rival = family != OURS
    rows = []
    for workload, clients, side, base, cells in drafting(results, sides):
        if base != family:
            continue
        mine = cells[side.name]
        ttft = f"{median_of(mine, ttft_ms):.0f}", spread(ratios(cells, side.name, base, ttft_ms))
        row = [
            workload,
            str(clients),
            side.name,
            f"{median_of(cells[base], speed):.1f}",
            f"{median_of(mine, speed):.1f}",
        ]
        row += [spread(ratios(cells, side.name, base, speed)), f"{median_of(cells[base], ttft_ms):.0f}", *ttft]
        row += [_share(drafts_of(mine).acceptance), f"{_tokens_a_step(mine):.2f}"]
        row.append(_share(same_texts(cells, side.name, base)))
        if rival:
            row.append(spread(ratios(cells, ours, side.name, speed)) if ours else "-")
        rows.append(row)
    header = ["workload", "clients", "server", "tok/s without", "with", "ratio", "TTFT ms without", "with", "ratio"]
    header += ["acceptance", "tokens a step", "same texts", *([f"{ours or OURS} over it"] if rival else [])]
    return table(header, rows) if rows else None


def _tokens_a_step(cells: Sequence[Cell]) -> float:
    tokens = sum(answer.completion_tokens for cell in cells for answer in cell.answers)
    return tokens / max(1, tokens - drafts_of(cells).accepted)


def proposer_table(results: Results, sides: Sequence[Side]) -> str | None:
    """Drafted tokens by proposer; None if no server tells."""
    rows = [
        [workload, str(clients), side.name, name, str(of.accepted), str(of.rejected), _share(of.acceptance)]
        for workload, clients, side, _, cells in drafting(results, sides)
        for name, of in proposers_of(cells[side.name]).items()
    ]
    header = ["workload", "clients", "server", "proposer", "accepted", "rejected", "acceptance"]
    return table(header, rows) if rows else None


def identity_table(results: Results, sides: Sequence[Side], found: Sequence[Fork]) -> str | None:
    """Our greedy answers with one client: how many fork, and by how little; None if there are none."""
    rows = []
    for workload, clients, side, _, cells in drafting(results, sides):
        if clients != 1 or side.base != OURS or workload == "random":
            continue
        mine = [fork for fork in found if (fork.workload, fork.side) == (workload, side.name)]
        count = sum(len(cell.answers) for cell in cells[side.name])
        gaps = [max((fork.gap for fork in mine), default=0.0), max((fork.reading.worst for fork in mine), default=0.0)]
        rows.append([workload, side.name, str(count), str(len(mine)), *(f"{gap:.4f}" for gap in gaps)])
    header = ["workload", "server", "answers", "forks", "largest gap at a fork", "anywhere in these answers"]
    return table(header, rows) if rows else None


def fork_table(found: Sequence[Fork]) -> str | None:
    """The forks with the largest gaps; None if there are none."""
    first = sorted(found, key=lambda fork: -fork.reading.worst)[:_FORKS_SHOWN]
    rows = [
        [
            f"{fork.workload} {fork.task}",
            fork.side,
            str(fork.position),
            _quoted(fork.without),
            _quoted(fork.drafted),
            f"{fork.gap:.4f}",
            f"{fork.plain.worst:.4f}",
            f"{fork.reading.worst:.4f}",
            f"{fork.reading.noise:.4f}",
        ]
        for fork in first
    ]
    header = ["request", "server", "at character", "without", "with", "gap", "largest gap without", "with", "noise"]
    return table(header, rows) if rows else None


def _quoted(text: str) -> str:
    return repr(text).replace("|", "\\|").replace("`", "'") if text else "(end)"


def verdict(found: Sequence[Fork]) -> str:
    """Whether rounding explains every fork."""
    if not found:
        return "No greedy answer differs."
    limit = noise_limit(found)
    if bugs := unexplained(found):
        where = ", ".join(f"{fork.workload} {fork.task} ({fork.side}, gap {fork.reading.worst:.3f})" for fork in bugs)
        return f"**BUG: {len(bugs)} answers hold tokens that rounding (up to {limit:.4f}) does not explain: {where}**"
    said = f"All {len(found)} forks lie within what logits differ by between batch widths (gaps up to {limit:.4f})."
    if not any(fork.plain.step_noise or fork.reading.step_noise for fork in found):
        said += " **But the width of steps changes no logit here: only prompts read in other parts can be the reason.**"
    return said


def assisted_table(run: AssistedRun, results: Results, side: str | None) -> str:
    """transformers beside itself; and our drafting side's tokens a second on the same prompts."""
    names = dict.fromkeys(one.workload for one in run.answers)
    rows = []
    for name in names:
        answers = [one for one in run.answers if one.workload == name]
        plain, assisted = speeds(answers)
        spread_of = spread([one.ratio for one in answers])
        ours = results.get((name, 1), {}).get(side or "", [])
        row = [name, str(len(answers)), f"{plain:.1f}", f"{assisted:.1f}", spread_of]
        row += [_share(assisted_drafts(answers).acceptance), f"{_assisted_step(answers):.2f}"]
        row += [f"{sum(one.same for one in answers) / len(answers):.2f}"]
        rows.append([*row, f"{median_of(ours, speed):.1f}" if ours else "-"])
    header = ["workload", "answers", "tok/s alone", "assisted", "ratio", "acceptance", "tokens a step", "same texts"]
    return table([*header, f"tok/s of {side or OURS}"], rows)


def assisted_drafts(answers: Sequence[Assisted]) -> Counts:
    """Of all answers together."""
    counts = [one.drafts for one in answers]
    return Counts(sum(one.accepted for one in counts), sum(one.rejected for one in counts))


def _assisted_step(answers: Sequence[Assisted]) -> float:
    return sum(one.assisted_tokens for one in answers) / max(1, sum(one.calls for one in answers))


def others_cores(results: Results) -> float:
    """The most cores that anything but server and client kept busy during a cell."""
    cells = [cell for sides in results.values() for rounds in sides.values() for cell in rounds]
    return max((cell.load.others_cpu_s / cell.load.wall_s for cell in cells), default=0.0)


def as_json(results: Results, sides: Sequence[Side]) -> list[dict[str, Any]]:
    """One object for each workload, number of clients and server."""
    bases = {side.name: side.base for side in sides}
    found = []
    for (workload, clients), cells in results.items():
        for name, mine in cells.items():
            one: dict[str, Any] = {"workload": workload, "clients": clients, "server": name, "rounds": len(mine)}
            one |= {"tokens_per_s": round(median_of(mine, speed), 3), "ttft_ms": round(median_of(mine, ttft_ms), 2)}
            one |= {"tokens": sum(answer.completion_tokens for cell in mine for answer in cell.answers)}
            drafts = drafts_of(mine)
            one |= {"accepted": drafts.accepted, "rejected": drafts.rejected}
            one["tokens_a_step"] = round(_tokens_a_step(mine), 4)
            one["proposers"] = {of: vars(counts) for of, counts in proposers_of(mine).items()}
            if (base := bases[name]) is not None:
                one["speed_ratios"] = [round(ratio, 4) for ratio in ratios(cells, name, base, speed)]
                one["ttft_ratios"] = [round(ratio, 4) for ratio in ratios(cells, name, base, ttft_ms)]
                one["same_texts"] = same_texts(cells, name, base)
            found.append(one)
    return found


def identity_json(found: Sequence[Fork]) -> dict[str, Any]:
    """The forks, and what rounding explains."""
    forks = [
        {"workload": fork.workload, "server": fork.side, "request": fork.task, "at": fork.position, "gap": fork.gap}
        | {"largest_gap": fork.reading.worst, "largest_gap_without": fork.plain.worst, "noise": fork.reading.noise}
        for fork in found
    ]
    return {"noise_limit": noise_limit(found), "bugs": len(unexplained(found)), "forks": forks}


def assisted_json(run: AssistedRun) -> dict[str, Any]:
    """Speeds, ratios and drafts by workload."""
    out: dict[str, Any] = {}
    for name in dict.fromkeys(one.workload for one in run.answers):
        answers = [one for one in run.answers if one.workload == name]
        plain, assisted = speeds(answers)
        drafts = assisted_drafts(answers)
        out[name] = {"tokens_per_s": {"alone": round(plain, 3), "assisted": round(assisted, 3)}}
        out[name] |= {"median_ratio": round(median_ratio(answers), 4), "answers": len(answers)}
        out[name] |= {"accepted": drafts.accepted, "rejected": drafts.rejected}
    return out
