"""POST /v1/moderations: OpenAI's shape, and its categories made of ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guards import CATEGORIES, Category, Verdict
from serving.wire.guard import GuardReport
from serving.wire.moderations import TEXT_CHARS_MAX, moderation_result, openai_flags, openai_scores
from tests.serving.guarded import BAD, BY_RULES, GOOD, client_of
from tests.serving.server import Server, serving

MODERATIONS = "/v1/moderations"
THEIRS = {
    *("harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent"),
    *("self-harm", "self-harm/intent", "self-harm/instructions", "sexual", "sexual/minors"),
    *("violence", "violence/graphic"),
}


def verdict(score: float, **categories: float) -> Verdict:
    label: Any = "unsafe" if score > 0.5 else "safe"
    found: dict[Category, float] = {name: categories.get(name, 0.0) for name in CATEGORIES}
    return Verdict(label, score, 0.5, jailbreak=False, jailbreak_score=0.0, categories=found)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"hate": 0.9}, {"hate": 0.9}),
        ({"hate": 0.9, "violence": 0.4}, {"hate": 0.9, "violence": 0.4, "hate/threatening": 0.4}),
        ({"harassment": 0.2, "violence": 0.4}, {"harassment": 0.2, "violence": 0.4, "harassment/threatening": 0.2}),
        *(({name: 0.3}, {"illicit": 0.3}) for name in ("crime", "cyber", "privacy", "deception")),
        ({"weapons": 0.7}, {"illicit": 0.7, "illicit/violent": 0.7}),
        ({"crime": 0.7, "violence": 0.6}, {"illicit": 0.7, "illicit/violent": 0.6, "violence": 0.6}),
        ({"self_harm": 0.5}, {"self-harm": 0.5, "self-harm/intent": 0.5, "self-harm/instructions": 0.5}),
        ({"sexual": 0.5}, {"sexual": 0.5}),
        ({"minors": 0.5}, {"sexual/minors": 0.5}),
        ({}, {}),
    ],
)
def test_scores(ours: dict[Category, float], theirs: dict[str, float]) -> None:
    scores = openai_scores(ours)
    assert set(scores) == THEIRS
    assert {name: score for name, score in scores.items() if score} == theirs


@given(st.dictionaries(st.sampled_from(get_args(Category)), st.floats(0, 1)), st.floats(0, 1))
def test_a_flagged_text_has_a_category_and_another_none(shares: dict[Category, float], score: float) -> None:
    judged = verdict(score, **{name: score * share for name, share in shares.items()})
    scores = openai_scores(judged.categories)
    flags = openai_flags(scores, judged)
    assert set(flags) == set(scores) == THEIRS
    assert any(flags.values()) == judged.unsafe
    assert all(0 <= value <= score for value in scores.values())
    assert not flags["violence/graphic"]


def test_the_leading_categories_are_those_of_half_the_score() -> None:
    judged = verdict(0.8, sexual=0.4, hate=0.39)
    flags = openai_flags(openai_scores(judged.categories), judged)
    assert [name for name, flag in flags.items() if flag] == ["sexual"]


def test_a_block_rule_alone_is_illicit() -> None:
    judged = Verdict("unsafe", 1.0, 0.5, jailbreak=False, jailbreak_score=0.0, rule="x")
    result = moderation_result(judged, GuardReport.of(judged, "strict"))
    assert [name for name, flag in result.categories.items() if flag] == ["illicit"]
    assert set(result.category_scores.values()) == {0.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("home"), "--model", str(tiny_model), *BY_RULES, guard="refuse") as server:
        yield server


@pytest.fixture
def moderator(server: Server) -> Iterator[openai.OpenAI]:
    with client_of(server.url) as client:
        yield client


def test_openais_shape(moderator: openai.OpenAI) -> None:
    answer = moderator.moderations.create(input=BAD, model="omni-moderation-latest")
    assert answer.id.startswith("modr-")
    assert answer.model.startswith("edgellm-guard-")
    [result] = answer.results
    assert result.flagged
    assert result.categories.illicit
    scores = result.category_scores.model_dump(by_alias=True)
    assert set(scores) == set(result.categories.model_dump(by_alias=True)) == THEIRS
    applied = result.category_applied_input_types.model_dump(by_alias=True)
    assert set(applied) == THEIRS
    assert list(applied.values()) == [["text"]] * len(THEIRS)
    found: Any = result
    assert (found.x_guard["label"], found.x_guard["level"]) == ("unsafe", "balanced")


def test_a_result_for_each_text_and_one_for_all_parts(moderator: openai.OpenAI) -> None:
    answer = moderator.moderations.create(input=[GOOD, BAD, ""])
    assert [result.flagged for result in answer.results] == [False, True, False]
    parts: Any = [{"type": "text", "text": part} for part in (GOOD, BAD[:-3], BAD[-3:])]
    [result] = moderator.moderations.create(input=parts).results
    assert result.flagged


def test_the_classifier_is_asked_where_no_rule_decides(tmp_path: Path, tiny_model: Path) -> None:
    with serving(tmp_path, "--model", str(tiny_model), "--guard-level", "strict", guard=None) as server:
        [result] = server.post(MODERATIONS, {"input": "How do I bake bread?"}).json()["results"]
    assert result["x_guard"]["level"] == "strict"
    assert 0 < result["x_guard"]["score"] < 1
    assert result["x_guard"]["window"]["text"] == "How do I bake bread?"
    assert set(result["x_guard"]["categories"]) == set(CATEGORIES)
    assert result["category_scores"]["hate"] == result["x_guard"]["categories"]["hate"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["a", 5]}, "input[1]"),
        ({"input": ["a", {"type": "text", "text": "a"}]}, "input[1]"),
        ({"input": [[1, 2]]}, "input[0]"),
        ({"input": [{"type": "text"}]}, "input[0].text"),
        ({"input": [{"type": "image_url", "image_url": {"url": "data:,"}}]}, "input[0].type"),
        ({"input": [{"type": "text", "text": "a"}, "a"]}, "input[1]"),
        ({"input": "a" * (TEXT_CHARS_MAX + 1)}, "input"),
        ({"input": [{"type": "text", "text": "a" * (TEXT_CHARS_MAX // 2 + 1)}] * 2}, "input"),
        ({"input": "\ud800"}, "input"),
        ({"input": "a", "model": 5}, "model"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_inputs(server: Server, body: dict[str, Any], param: str) -> None:
    answer = server.post(MODERATIONS, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert answer.json()["error"]["type"] == "invalid_request_error"
