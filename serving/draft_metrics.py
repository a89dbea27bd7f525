"""The metrics of speculative decoding, of every loaded model that generates text. Asked for at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from edgellm.speculative.speculator import ProposerStats, SpeculatorSnapshot
from edgellm.tune.adapted import Adapted


@dataclass(frozen=True, slots=True)
class DraftSnapshot:
    """One loaded model."""

    model: str
    figures: SpeculatorSnapshot | None  # None: nothing is drafted, and `reason` says why
    reason: str = ""
    adapted: Adapted | None = None  # what came of adapting its drafter; None: it has none
    adapting: bool = False


_COUNTERS: tuple[tuple[str, str, Callable[[ProposerStats], float]], ...] = (
    ("draft_guesses", "Guesses of a proposer that were verified.", lambda stats: stats.guesses),
    ("draft_accepted_tokens", "Of their tokens, those that the model confirmed.", lambda stats: stats.accepted),
    ("draft_rejected_tokens", "Of their tokens, those that it did not.", lambda stats: stats.rejected),
)


def draft_families(models: Sequence[DraftSnapshot]) -> Iterator[Metric]:
    """One family a figure, labelled by model and proposer; none if no model generates text."""
    if not models:
        return
    text = "1 where answers are drafted, 0 where they are not, and why."
    gauge = GaugeMetricFamily("edgellm_drafting", text, labels=["model", "reason"])
    for model in models:
        gauge.add_metric([model.model, model.reason], float(model.figures is not None))
    yield gauge
    drafting = [(model.model, model.figures) for model in models if model.figures is not None]
    calls = CounterMetricFamily("edgellm_target_calls", "Rows with which answers went on.", labels=["model"])
    tokens = CounterMetricFamily("edgellm_target_tokens", "Tokens that these brought.", labels=["model"])
    for name, figures in drafting:
        calls.add_metric([name], figures.target_calls)
        tokens.add_metric([name], figures.tokens)
    yield calls
    yield tokens
    for metric, text, value in _COUNTERS:
        counter = CounterMetricFamily(f"edgellm_{metric}", text, labels=["model", "proposer"])
        for name, figures in drafting:
            for proposer, stats in figures.proposers.items():
                counter.add_metric([name, proposer], value(stats))
        yield counter
    text = "Time that drafts have saved, estimated from the times of steps by their rows."
    saved = GaugeMetricFamily("edgellm_draft_saved_seconds", text, labels=["model", "proposer"])
    for name, figures in drafting:
        for proposer, stats in figures.proposers.items():
            saved.add_metric([name, proposer], stats.saved_s)
    yield saved
    yield from _adaptation_families([(model, model.adapted) for model in models if model.adapted is not None])


def _adaptation_families(models: Sequence[tuple[DraftSnapshot, Adapted]]) -> Iterator[Metric]:
    """Of models with a drafter."""
    if not models:
        return
    text = "1 while the model's drafter is being adapted."
    gauge = GaugeMetricFamily("edgellm_drafter_adapting", text, labels=["model"])
    text = "Adaptations of the model's drafter, by what came of them."
    counter = CounterMetricFamily("edgellm_drafter_adaptations", text, labels=["model", "result"])
    text = "Time of processors that these took."
    seconds = CounterMetricFamily("edgellm_drafter_adaptation_cpu_seconds", text, labels=["model"])
    text = "Share of drafted tokens accepted on answers held out, when it was last measured."
    held_out = GaugeMetricFamily("edgellm_drafter_acceptance", text, labels=["model", "adapter"])
    for model, adapted in models:
        gauge.add_metric([model.model], float(model.adapting))
        for result in ("taken", "dropped", "failed"):
            counter.add_metric([model.model, result], getattr(adapted, result))
        seconds.add_metric([model.model], adapted.cpu_seconds)
        for adapter, rate in (("none", adapted.acceptance_without), ("in use", adapted.acceptance_after)):
            if rate is not None:
                held_out.add_metric([model.model, adapter], rate)
    yield from (gauge, counter, seconds, held_out)
