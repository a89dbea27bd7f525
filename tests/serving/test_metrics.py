"""Metrics: what is counted comes out, labels stay bounded, a scrape asks for one snapshot."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from edgellm.engine.types import Usage
from serving.errors import install
from serving.metrics import MODELS_MAX, CountRequests, Metrics, ModelSnapshot
from tests.serving.live import Connection, serve

SNAPSHOT = ModelSnapshot(
    "smol", 3, 2, 100, 8192, prefix_lookups=5, prefix_hits=4, preemptions=1, step_seconds=2.0, decode_seconds=1.9
)


def samples(metrics: Metrics) -> dict[tuple[str, tuple[str, ...]], float]:
    body, _ = metrics.render()
    families = text_string_to_metric_families(body.decode())
    return {
        (sample.name, tuple(sample.labels.values())): sample.value for family in families for sample in family.samples
    }


def test_engine_state_comes_from_one_snapshot_a_scrape() -> None:
    calls = []

    def snapshot() -> list[ModelSnapshot]:
        calls.append(1)
        return [SNAPSHOT]

    metrics = Metrics(snapshot)
    assert calls == []
    found = samples(metrics)
    assert calls == [1]
    assert found["edgellm_models_loaded", ()] == 1
    values = {name: found[f"edgellm_{name}", ("smol",)] for name in ("queued_requests", "active_sequences")}
    assert values == {"queued_requests": 3, "active_sequences": 2}
    assert found["edgellm_kv_cells_used", ("smol",)] == 100
    assert found["edgellm_kv_cells", ("smol",)] == 8192
    assert found["edgellm_prefix_lookups_total", ("smol",)] == 5
    assert found["edgellm_prefix_hits_total", ("smol",)] == 4
    assert found["edgellm_preemptions_total", ("smol",)] == 1


def test_tokens_and_times() -> None:
    metrics = Metrics(lambda: [])
    model = metrics.for_model("smol")
    model.count_tokens(Usage(10, 4, cached_tokens=6, accepted_draft_tokens=3, rejected_draft_tokens=1))
    model.count_tokens(Usage(1, 1))
    model.observe_ttft_s(0.18)
    model.observe_inter_token_s(0.008)
    model.observe_inter_token_s(100.0)
    model.observe_request_s(2.0)
    found = samples(metrics)
    assert found["edgellm_prompt_tokens_total", ("smol",)] == 11
    assert found["edgellm_cached_tokens_total", ("smol",)] == 6
    assert found["edgellm_generated_tokens_total", ("smol",)] == 5
    assert found["edgellm_accepted_draft_tokens_total", ("smol",)] == 3
    assert found["edgellm_rejected_draft_tokens_total", ("smol",)] == 1
    assert found["edgellm_time_to_first_token_seconds_sum", ("smol",)] == 0.18
    buckets = {key[1][0]: value for key, value in found.items() if key[0] == "edgellm_inter_token_seconds_bucket"}
    buckets |= {key[1][1]: value for key, value in found.items() if key[0] == "edgellm_inter_token_seconds_bucket"}
    assert (buckets["0.0075"], buckets["0.01"], buckets["60.0"], buckets["+Inf"]) == (0, 1, 1, 2)
    assert found["edgellm_request_seconds_count", ("smol",)] == 1


def test_models_are_bounded() -> None:
    metrics = Metrics(lambda: [])
    for number in range(MODELS_MAX + 20):
        metrics.for_model(f"model-{number}").count_tokens(Usage(1, 1))
    found = samples(metrics)
    labels = {labels for name, labels in found if name == "edgellm_prompt_tokens_total"}
    assert len(labels) == MODELS_MAX + 1
    assert found["edgellm_prompt_tokens_total", ("other",)] == 20
    assert metrics.for_model("model-3") is metrics.for_model("model-3")


def test_two_servers_in_one_process() -> None:
    first, second = Metrics(lambda: []), Metrics(lambda: [SNAPSHOT])
    first.for_model("a")
    assert ("edgellm_kv_cells", ("smol",)) not in samples(first)
    assert ("edgellm_prompt_tokens_total", ("a",)) not in samples(second)


def test_requests_are_counted_by_template() -> None:
    metrics = Metrics(lambda: [])
    app = FastAPI()
    install(app)

    @app.get("/v1/models/{model_id}")
    async def model(model_id: str) -> dict[str, Any]:
        if model_id == "bug":
            raise RuntimeError("a bug")
        return {}

    with serve(CountRequests(app, metrics)) as port, Connection(port) as connection:
        for method, path in [("GET", "/v1/models/a"), ("GET", "/v1/models/b"), ("GET", "/x"), ("PROPFIND", "/y")]:
            connection.send(method, path, [("Host", "localhost")])
            connection.answer()
        connection.send("GET", "/v1/models/bug", [("Host", "localhost")])
        assert connection.answer().status == 500
    found = {labels: value for (name, labels), value in samples(metrics).items() if name.endswith("requests_total")}
    by_set = {frozenset(labels): value for labels, value in found.items()}
    assert by_set[frozenset({"GET", "/v1/models/{model_id}", "200"})] == 2
    assert by_set[frozenset({"GET", "/v1/models/{model_id}", "500"})] == 1
    assert by_set[frozenset({"GET", "unmatched", "404"})] == 1
    assert sum(by_set.values()) == 5


@pytest.mark.parametrize(("outcome", "status"), [(None, "499"), (RuntimeError("x"), "500")])
def test_requests_without_an_answer(outcome: Exception | None, status: str) -> None:
    metrics = Metrics(lambda: [])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if outcome is not None:
            raise outcome

    async def run() -> None:
        counted = CountRequests(app, metrics)
        if outcome is None:
            await counted({"type": "http", "method": "GET"}, None, None)
        else:
            with pytest.raises(RuntimeError):
                await counted({"type": "http", "method": "GET"}, None, None)

    asyncio.run(run())
    assert any(name.endswith("requests_total") and status in labels for name, labels in samples(metrics))
