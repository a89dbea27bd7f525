"""What scripts/bench_tune prints of its runs. A ratio is always that of a time, memory or loss over the rival's."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from bench.report import table
from bench.tune_runs import Run
from bench.tune_ways import WAYS

_MB = 1e6
PUBLISHED = (
    "Published, PockEngine (arXiv 2310.17752), LLaMA2-7B on a Jetson Orin: PyTorch LoRA of rank 8 takes 7.3 s a step "
    "and 30.9 GB, PockEngine in full 1.8 s and 43.1 GB, sparse 0.9 s and 31.2 GB: 2x from sparsity, 8.1x in all."
)


def seconds_to(run: Run, loss: float) -> float | None:
    """Training until the validation loss is that low, on a line between the looks at it; None if it never is."""
    before = None
    for point in run.points:
        if point.loss <= loss:
            if before is None:
                return point.seconds
            share = (before.loss - loss) / (before.loss - point.loss)
            return before.seconds + share * (point.seconds - before.seconds)
        before = point
    return None


def runs_table(runs: Mapping[str, Run], rates: Mapping[str, float], dtypes: Mapping[str, str], tokens: int) -> str:
    """`tokens`: trained on in all epochs together."""
    header = [
        "way",
        "trained",
        "type",
        "rate",
        "s/step",
        "tokens/s",
        "steps s",
        "start s",
        "of it analysis s",
        "other cores",
    ]
    rows = []
    for way, run in runs.items():
        rows.append(
            [
                WAYS[way],
                f"{run.parameters / 1e6:.2f} M",
                dtypes[way],
                f"{rates[way]:g}",
                f"{statistics.median(run.step_s):.2f}",
                f"{tokens / run.train_s:.0f}",
                f"{run.train_s:.1f}",
                f"{run.start_s:.1f}",
                f"{run.analysis_s:.1f}",
                f"{run.others_cores:.2f}",
            ]
        )
    return table(header, rows)


def memory_table(runs: Mapping[str, Run]) -> str:
    """MB of 10^6 bytes."""
    header = ["way", "peak RSS MB", "of it training MB", "private MB", "cache on disk MB", "of a's peak"]
    rows = []
    for way, run in runs.items():
        sizes = (run.peak_rss_bytes, run.training_peak_rss_bytes, run.peak_private_bytes, run.disk_bytes)
        share = _ratio(run.peak_rss_bytes, runs["a"].peak_rss_bytes) if "a" in runs else None
        rows.append([WAYS[way], *(f"{size / _MB:.0f}" for size in sizes), _text(share)])
    return table(header, rows)


def loss_table(runs: Mapping[str, Run]) -> str:
    """Validation loss at equal tokens: each look at it, by the share of the steps that came before."""
    shares = sorted({_share(run, point.step) for run in runs.values() for point in run.points})
    rows = []
    for way, run in runs.items():
        found = {_share(run, point.step): f"{point.loss:.4f}" for point in run.points}
        rows.append([WAYS[way], *(found.get(share, "-") for share in shares)])
    return table(["validation loss at", *(f"{share:.0%}" for share in shares)], rows)


def _share(run: Run, step: int) -> float:
    return round(step / max(1, len(run.step_s)), 2)


def goal_table(runs: Mapping[str, Run]) -> str:
    """How long each way takes to the loss that a ends at. Needs a."""
    header = [
        "way",
        "s to a's last loss",
        "with start",
        "of a",
        "of b",
        "with start, of a",
        "of b",
        "last loss of a's",
        "s to 1.01 of it",
    ]
    rows = []
    for way, goal in goals(runs).items():
        values = [_text(goal["seconds"], 1), _text(goal["seconds_with_start"], 1)]
        names = ("of_a", "of_b", "with_start_of_a", "with_start_of_b", "last_loss_of_a")
        figures = [*(_text(goal[name], 3) for name in names), _text(goal["seconds_to_1_percent"], 1)]
        rows.append([WAYS[way], *values, *figures])
    return table(header, rows)


def goals(runs: Mapping[str, Run]) -> dict[str, dict[str, float | None]]:
    """By way. Seconds are None for a loss that is never reached; empty without a."""
    if "a" not in runs:
        return {}
    target = runs["a"].points[-1].loss
    bare = {way: seconds_to(run, target) for way, run in runs.items()}
    whole = {way: None if seconds is None else seconds + runs[way].start_s for way, seconds in bare.items()}
    return {
        way: {
            "seconds": bare[way],
            "seconds_with_start": whole[way],
            "seconds_to_1_percent": seconds_to(run, 1.01 * target),
            "of_a": _ratio(bare[way], bare["a"]),
            "of_b": _ratio(bare[way], bare.get("b")),
            "with_start_of_a": _ratio(whole[way], whole["a"]),
            "with_start_of_b": _ratio(whole[way], whole.get("b")),
            "last_loss_of_a": _ratio(run.points[-1].loss, target),
            "peak_of_a": _ratio(run.peak_rss_bytes, runs["a"].peak_rss_bytes),
        }
        for way, run in runs.items()
    }


def targets(runs: Mapping[str, Run]) -> str | None:
    """The issue's figures and whether ours has them; None if ours or a is missing."""
    if "ours" not in runs or "a" not in runs:
        return None
    ours = goals(runs)["ours"]
    wanted = (
        ("time to a's last loss, of a (start included)", "with_start_of_a", 0.25),
        ("the same, of b", "with_start_of_b", 0.5),
        ("peak memory, of a (Qwen 0.5B)", "peak_of_a", 0.4),
        ("last validation loss, of a", "last_loss_of_a", 1.01),
    )
    rows = []
    for label, name, most in wanted:
        value = ours[name]
        met = value is not None and value <= most
        rows.append([label, f"<= {most:g}", _text(value, 3), "yes" if met else "NO"])
    return table(["target", "wanted", "measured", "met"], rows)


def sparsity(runs: Mapping[str, Run]) -> str | None:
    """What sparsity and the rest bring in time a step, beside what was published; None without ours and a."""
    if "ours" not in runs or "a" not in runs:
        return None
    step_s = {way: run.train_s / len(run.step_s) for way, run in runs.items()}
    parts = [f"{step_s['a'] / step_s['ours']:.1f}x a's steps a second in all"]
    if "full" in runs:
        parts.insert(0, f"{step_s['full'] / step_s['ours']:.1f}x from sparsity")
    return f"{PUBLISHED}\nOurs, all epochs together: {', '.join(parts)}."


def as_json(runs: Mapping[str, Run]) -> dict[str, Any]:
    """Every number of every run."""
    found = goals(runs)
    return {
        way: {
            "parameters": run.parameters,
            "scheme": run.plan.get("sparsity"),
            "step_s": statistics.median(run.step_s),
            "train_s": run.train_s,
            "start_s": run.start_s,
            "analysis_s": run.analysis_s,
            "wall_s": run.wall_s,
            "peak_rss_bytes": run.peak_rss_bytes,
            "training_peak_rss_bytes": run.training_peak_rss_bytes,
            "peak_private_bytes": run.peak_private_bytes,
            "disk_bytes": run.disk_bytes,
            "others_cores": run.others_cores,
            "points": [[round(point.seconds, 2), point.step, point.loss, point.accuracy] for point in run.points],
            "to_goal": found.get(way),
        }
        for way, run in runs.items()
    }


def _ratio(value: float | None, of: float | None) -> float | None:
    return value / of if value is not None and of else None


def _text(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
