"""The metrics of paged experts, of the models that have any. Asked for at each scrape, as all the engine's state is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from edgellm.moe.pager import PagerSnapshot

_Value = Callable[[PagerSnapshot], float]

_GAUGES: tuple[tuple[str, str, _Value], ...] = (
    ("expert_slots", "Experts that memory has room for.", lambda now: now.slots),
    ("experts", "Experts there are.", lambda now: now.experts),
    ("expert_memory_bytes", "Memory of the experts that are there.", lambda now: now.resident_bytes),
    ("expert_prefetch", "1 while experts are read ahead, 0 while that does not pay.", lambda now: float(now.ahead)),
)
_COUNTERS: tuple[tuple[str, str, _Value], ...] = (
    ("expert_needed", "Experts that layers of steps needed.", lambda now: now.stats.needed),
    ("expert_hits", "Of those, in memory.", lambda now: now.stats.hits),
    ("expert_loads", "Of those, read and kept.", lambda now: now.stats.loads),
    ("expert_streamed", "Of those, read and not kept.", lambda now: now.stats.streamed),
    ("expert_prefetched", "Experts read ahead.", lambda now: now.stats.prefetched),
    ("expert_prefetch_used", "Of those, needed then.", lambda now: now.stats.prefetch_used),
    ("expert_prefetch_wasted", "Of those, dropped unused.", lambda now: now.stats.prefetch_wasted),
    ("expert_reads", "Reads of expert matrices.", lambda now: now.stats.reads),
    ("expert_read_bytes", "Bytes read.", lambda now: now.stats.bytes),
    ("expert_stall_seconds", "Time that steps waited for reads.", lambda now: now.stats.stall_ns / 1e9),
)


def expert_families(snapshots: Sequence[tuple[str, PagerSnapshot]]) -> Iterator[Metric]:
    """Of (model, pager): one family a figure, labelled by model; none if no model is paged."""
    if not snapshots:
        return
    for name, text, value in _GAUGES:
        gauge = GaugeMetricFamily(f"edgellm_{name}", text, labels=["model"])
        for model, pager in snapshots:
            gauge.add_metric([model], value(pager))
        yield gauge
    yield _predictors(snapshots)
    for name, text, value in _COUNTERS:
        counter = CounterMetricFamily(f"edgellm_{name}", text, labels=["model"])
        for model, pager in snapshots:
            counter.add_metric([model], value(pager))
        yield counter


def _predictors(snapshots: Sequence[tuple[str, PagerSnapshot]]) -> Metric:
    text = "1 for what foresees experts: routers, table or none."
    gauge = GaugeMetricFamily("edgellm_expert_predictor", text, labels=["model", "predictor"])
    for model, pager in snapshots:
        gauge.add_metric([model, pager.predictor], 1.0)
    return gauge
