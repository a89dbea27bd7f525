"""Prometheus metrics: what requests did is counted here, what the engine is doing is asked for at each scrape.

Nothing runs per token but one `observe` (about 2 us for a bound histogram on a shared x86 core): state that the
engine keeps anyway comes from a snapshot, taken only when somebody scrapes. Every instance has its own registry, so
that several servers can live in one process. Labels are bounded: endpoints are route templates, models known ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgellm.engine.types import Usage
from edgellm.moe.pager import PagerSnapshot
from serving.draft_metrics import DraftSnapshot, draft_families
from serving.expert_metrics import expert_families

MODELS_MAX = 64
"""Models with labels of their own; more share the label "other"."""
OTHER = "other"
UNMATCHED = "unmatched"
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})

# Seconds, 1 ms to 60 s: dense where tokens of small models fall (2 to 200 ms).
BUCKETS_S = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0),
)


@dataclass(frozen=True, slots=True)
class ModelSnapshot:
    """One loaded model's engine at this moment. From prefix_lookups on, figures only grow while it is loaded."""

    model: str
    queued_requests: int
    active_sequences: int
    kv_cells_used: int
    kv_cells_total: int
    prefix_lookups: int
    prefix_hits: int
    preemptions: int
    step_seconds: float
    decode_seconds: float
    experts: PagerSnapshot | None = None  # of a model whose experts are paged
    drafts: DraftSnapshot | None = None  # of a model that generates text


Snapshot = Callable[[], Iterable[ModelSnapshot]]


class _EngineCollector(Collector):
    """Asks for a snapshot at each scrape. A model unloaded and loaded again counts from 0, as a restart does."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not ask for a snapshot."""
        return ()

    def collect(self) -> Iterator[Metric]:
        models = tuple(self._snapshot())
        yield GaugeMetricFamily("edgellm_models_loaded", "Models in memory.", value=len(models))
        gauges: tuple[tuple[str, str, Callable[[ModelSnapshot], int]], ...] = (
            ("queued_requests", "Requests that wait for a sequence.", lambda model: model.queued_requests),
            ("active_sequences", "Sequences being answered.", lambda model: model.active_sequences),
            ("kv_cells_used", "KV cache cells in use, idle prefixes included.", lambda model: model.kv_cells_used),
            ("kv_cells", "KV cache cells there are.", lambda model: model.kv_cells_total),
        )
        counters: tuple[tuple[str, str, Callable[[ModelSnapshot], float]], ...] = (
            ("prefix_lookups", "Prompts looked up in the prefix cache.", lambda model: model.prefix_lookups),
            ("prefix_hits", "Prompts that continued a cached prefix.", lambda model: model.prefix_hits),
            ("preemptions", "Sequences put off because cells ran short.", lambda model: model.preemptions),
            ("engine_step_seconds", "Time spent in steps of the engine.", lambda model: model.step_seconds),
            ("engine_decode_seconds", "Of that, time inside llama_decode.", lambda model: model.decode_seconds),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(f"edgellm_{name}", text, labels=["model"])
            for model in models:
                gauge.add_metric([model.model], value(model))
            yield gauge
        for name, text, total in counters:
            counter = CounterMetricFamily(f"edgellm_{name}", text, labels=["model"])
            for model in models:
                counter.add_metric([model.model], total(model))
            yield counter
        yield from draft_families([model.drafts for model in models if model.drafts is not None])
        yield from expert_families([(model.model, model.experts) for model in models if model.experts is not None])


class ModelMetrics:
    """The metrics of one model, their labels bound. Cheap to use from the event loop's thread."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.observe_ttft_s: Callable[[float], None] = metrics.ttft.labels(model).observe
        """Seconds from the request's arrival to the first token of an answer."""
        self.observe_inter_token_s: Callable[[float], None] = metrics.inter_token.labels(model).observe
        """Seconds between two tokens of one answer."""
        self.observe_request_s: Callable[[float], None] = metrics.duration.labels(model).observe
        """Seconds from the request's arrival to its end."""
        self._prompt = metrics.prompt_tokens.labels(model)
        self._cached = metrics.cached_tokens.labels(model)
        self._generated = metrics.generated_tokens.labels(model)
        self._accepted = metrics.accepted_tokens.labels(model)
        self._rejected = metrics.rejected_tokens.labels(model)

    def count_tokens(self, usage: Usage) -> None:
        """Add the counts of one finished answer."""
        self._prompt.inc(usage.prompt_tokens)
        self._cached.inc(usage.cached_tokens)
        self._generated.inc(usage.completion_tokens)
        self._accepted.inc(usage.accepted_draft_tokens)
        self._rejected.inc(usage.rejected_draft_tokens)


class Metrics:
    """All metrics of one server. `snapshot` is called at each scrape and must be quick and thread-safe."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(snapshot))
        self.requests = Counter(
            "edgellm_http_requests", "HTTP requests answered.", ["method", "endpoint", "status"], registry=self.registry
        )
        self.prompt_tokens = self._tokens("prompt_tokens", "Prompt tokens of finished answers.")
        self.cached_tokens = self._tokens("cached_tokens", "Prompt tokens found in the prefix cache.")
        self.generated_tokens = self._tokens("generated_tokens", "Tokens generated.")
        self.accepted_tokens = self._tokens("accepted_draft_tokens", "Drafted tokens that the model confirmed.")
        self.rejected_tokens = self._tokens("rejected_draft_tokens", "Drafted tokens that it did not.")
        self.ttft = self._seconds("time_to_first_token_seconds", "From a request's arrival to its first token.")
        self.inter_token = self._seconds("inter_token_seconds", "Between two tokens of an answer.")
        self.duration = self._seconds("request_seconds", "From a request's arrival to its end.")
        self._models: dict[str, ModelMetrics] = {}

    def _tokens(self, name: str, text: str) -> Counter:
        return Counter(f"edgellm_{name}", text, ["model"], registry=self.registry)

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(f"edgellm_{name}", text, ["model"], registry=self.registry, buckets=BUCKETS_S)

    def for_model(self, model: str) -> ModelMetrics:
        """The metrics of a known model (never a name straight from a request)."""
        found = self._models.get(model)
        if found is None:
            label = model if len(self._models) < MODELS_MAX else OTHER
            found = self._models.get(label) or ModelMetrics(self, label)
            self._models[label] = found
        return found

    def count_request(self, method: str, endpoint: str, status: int) -> None:
        """Count one answered request. `endpoint` is a route's template, such as /v1/models/{model_id}."""
        self.requests.labels(method if method in _METHODS else OTHER, endpoint, str(status)).inc()

    def render(self) -> tuple[bytes, str]:
        """The exposition (body, content type). Raises what the snapshot raises."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class CountRequests:
    """ASGI middleware, meant to be outermost: counts every answer, refusals too, under its route's template."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # nothing sent: the client went away before

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except Exception:
            status = 500 if status == 499 else status
            raise
        finally:
            endpoint = getattr(scope.get("route"), "path", None) or UNMATCHED
            self._metrics.count_request(scope["method"], endpoint, status)
