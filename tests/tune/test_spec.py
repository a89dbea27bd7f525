"""A run's order: it travels as JSON, and what makes no run is refused."""

from __future__ import annotations

import json

import pytest

from edgellm.errors import ConfigError
from edgellm.tune.defaults import decide
from edgellm.tune.spec import RunSpec

PATHS = {"model": "m.gguf", "data": "d.jsonl", "output": "a.gguf"}


def test_it_arrives_as_it_was_sent() -> None:
    spec = RunSpec(**PATHS, method="dpo", beta=0.3, sparsity="top-3", memory_budget_bytes=1 << 31, epochs=2)  # type: ignore[arg-type]
    assert RunSpec.parse(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "reinforcement"),
        ("epochs", 0),
        ("batch_size", 1.5),
        ("rank", -3),
        ("beta", 0),
        ("learning_rate_multiplier", float("inf")),
        ("alpha", float("nan")),
        ("sparsity", "some"),
        ("memory_budget_bytes", 0),
        ("row_tokens", 3),
        ("seed", -1),
        ("time_budget_s", -2.0),
    ],
)
def test_what_makes_no_run_is_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        RunSpec.parse(json.dumps(PATHS | {field: value}))


@pytest.mark.parametrize(
    ("text", "words"), [("{", "no JSON"), ("[]", "an object"), ('{"model": "m"}', "needs the field 'data'")]
)
def test_what_is_no_order_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RunSpec.parse(text)


def test_what_is_said_is_kept_and_the_rest_is_chosen() -> None:
    spec = RunSpec(**PATHS, epochs=2, batch_size=5, rank=4, learning_rate_multiplier=0.5)  # type: ignore[arg-type]
    said = decide(spec, 1000, 576)
    assert (said.epochs, said.batch_size, said.rank, said.learning_rate_multiplier) == (2, 5, 4, 0.5)
    few, many = (decide(RunSpec(**PATHS), count, 576) for count in (10, 10_000))
    assert said.learning_rate == few.learning_rate / 2
    assert few.epochs > many.epochs
    assert few.batch_size < many.batch_size
    assert decide(RunSpec(**PATHS, batch_size=64), 10, 576).batch_size == 10  # type: ignore[arg-type]


def test_wider_models_and_preferences_take_smaller_steps() -> None:
    narrow, wide = (decide(RunSpec(**PATHS), 100, width).learning_rate for width in (576, 4096))
    assert narrow == pytest.approx(2e-3, rel=0.01)
    assert wide == pytest.approx(narrow * 576 / 4096, rel=0.01)
    assert decide(RunSpec(**PATHS), 100, 64).learning_rate == pytest.approx(
        narrow, rel=0.01
    )  # tiny models make no exception
    assert decide(RunSpec(**PATHS, method="dpo"), 100, 576).learning_rate < narrow / 2  # type: ignore[arg-type]
