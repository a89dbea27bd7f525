"""The metrics of the guard: verdicts by what became of the text, failures, the time of judging."""

from __future__ import annotations

from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram

from guards import Verdict
from serving.metrics import BUCKETS_S

Action = Literal["answered", "annotated", "refused", "moderated"]


class GuardMetrics:
    """Any thread may count."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._verdicts = Counter(
            "edgellm_guard_verdicts",
            "Texts judged, by what was found and what became of them.",
            ["label", "jailbreak", "action"],
            registry=registry,
        )
        self._errors = Counter("edgellm_guard_errors", "Texts on which the guard failed.", registry=registry)
        self._rules = Counter("edgellm_guard_rules", "Verdicts that a block rule decided.", registry=registry)
        self._seconds = Histogram(
            "edgellm_guard_seconds",
            "Time of judging a text, waiting not counted.",
            registry=registry,
            buckets=BUCKETS_S,
        )

    def judged(self, verdict: Verdict) -> None:
        """The guard is through with a text."""
        self._seconds.observe(verdict.milliseconds / 1e3)
        if verdict.rule is not None:
            self._rules.inc()

    def failed(self) -> None:
        """The guard has raised an exception."""
        self._errors.inc()

    def count(self, verdict: Verdict, action: Action) -> None:
        """What became of a text that was judged."""
        self._verdicts.labels(verdict.label, str(verdict.jailbreak).lower(), action).inc()
