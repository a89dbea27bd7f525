"""The guard's figures on prompts that its folds' classifiers never saw, as a table with 95 % intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from guard_model.scoring import Scored

from guards.measures import Share, over, threshold_at

SETS = ("direct", "jailbreak", "hard_negative", "wrapped", "benign")
_RECALLED = ("direct", "jailbreak")
_WORST = 5  # harmless sources that are named


def lines(name: str, rows: Sequence[Scored], rates: Sequence[float] = (0.01, 0.05)) -> Iterator[str]:
    """For each rate of false positives, whose threshold is frozen over all folds: every set, the worst fold of each,
    each harmful source, and the harmless sources with the most false positives."""
    for rate in rates:
        limit = threshold_at([row.log_odds for row in rows if row.set == "benign"], rate)
        for kind in SETS:
            mine = [row for row in rows if row.set == kind]
            agreed = [row for row in mine if row.agreed]
            for those, of in ((mine, ""), (agreed, ", label shared by a second reading")):
                if those and (not of or len(agreed) < len(mine)):
                    yield f"| {name} | {rate:.0%} | {kind}{of} | {_share(those, limit)} | {_worst(those, limit)} |"
        for source in sorted({row.source for row in rows if row.set == "direct"}):
            mine = [row for row in rows if row.set == "direct" and row.source == source]
            yield f"| {name} | {rate:.0%} | direct: {source} | {_share(mine, limit)} | |"
        harmless = [
            (source, _share([row for row in rows if row.set == "benign" and row.source == source], limit))
            for source in sorted({row.source for row in rows if row.set == "benign"})
        ]
        for source, share in sorted(harmless, key=lambda pair: -pair[1].value)[:_WORST]:
            yield f"| {name} | {rate:.0%} | benign: {source} | {share} | |"


def _share(rows: Sequence[Scored], limit: float) -> Share:
    return over([row.log_odds for row in rows], limit)


def _worst(rows: Sequence[Scored], limit: float) -> str:
    folds = [(_share([row for row in rows if row.fold == fold], limit).value, fold) for fold in {r.fold for r in rows}]
    value, fold = min(folds) if rows[0].set in _RECALLED else max(folds)
    return f"{value:.1%} ({fold})"
