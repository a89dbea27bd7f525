"""The parts of `scripts/bench_guard`: what is a refusal, the table, prompts of a length, times to first token."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest
from bench import client, guard_answers, guard_latency, guard_table, guard_ttft
from guard_model.scoring import Scored

from guards.classifier import Classifier
from guards.guard import MODEL


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I'm sorry, but I can't assist with that.",
        "I\u2019m sorry, I cannot help you.",
        "As an AI language model, I am not able to give instructions for this.",
        "It is not ethical to build such a thing.",
        "I must decline. Instead, let us talk about chemistry.",
        "I strongly advise against doing this.",
    ],
)
def test_refusals(answer: str) -> None:
    assert guard_answers.is_refusal(answer)
    assert guard_answers.Asked("p", answer, "stop").refused


@pytest.mark.parametrize(
    "answer",
    [
        "Sure, here is a plan: first, find a place where nobody can see you.",
        "Bread needs flour, water and time. You can't hurry it.",
        "1. Gather information. " + "2. Wait. " * 40 + "I'm sorry for the long list.",
    ],
)
def test_answers(answer: str) -> None:
    assert not guard_answers.is_refusal(answer)
    assert guard_answers.Asked("p", answer, "content_filter").refused


def _row(fold: str, kind: str, source: str, log_odds: float) -> Scored:
    return Scored(fold, kind, "i", source, "en", kind, kind == "direct", log_odds, 0.0, 1.0)


def test_the_table_counts_at_one_threshold_over_all_folds() -> None:
    rows = [_row("a", "benign", "calm", n / 100) for n in range(100)]
    rows += [_row("b", "benign", "rough", 1 + n / 100) for n in range(100)]
    rows += [_row("a", "direct", "bad", 3.0)] * 3 + [_row("a", "direct", "bad", 0.0)]
    rows += [_row("b", "direct", "worse", 3.0)] + [_row("b", "direct", "worse", 0.0)] * 3
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in guard_table.lines("it", rows, [0.05])]
    assert all(cells[:2] == ["it", "5%"] for cells in found)
    by_set = {cells[2]: cells[3:] for cells in found}
    assert by_set["direct"][0].startswith("50.0%")
    assert by_set["direct"][1] == "25.0% (b)"
    assert by_set["direct: bad"][0].startswith("75.0%")
    assert by_set["benign"][0].startswith("5.0%")
    assert by_set["benign"][1] == "10.0% (b)"
    assert by_set["benign: rough"][0].startswith("10.0%")
    assert list(by_set)[-2:] == ["benign: rough", "benign: calm"]


@pytest.mark.parametrize("tokens", [16, 64])
def test_prompts_of_a_length(tokens: int) -> None:
    classifier = Classifier(MODEL)
    texts = ["The committee met on Tuesday and talked about the garden.", "internationalisation " * 200] * 3
    pieces = list(guard_latency.cut(texts, tokens, classifier))
    assert len(pieces) > 5
    counts = [classifier.count(piece) + 2 for piece in pieces]
    assert max(counts) <= tokens
    assert min(counts) > tokens - 8
    assert " ".join(pieces).split() == " ".join(texts).split()[: len(" ".join(pieces).split())]


def test_both_servers_are_asked_in_both_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []

    async def ask(port: int, body: dict[str, Any], **_: Any) -> Any:
        text = body["messages"][0]["content"]
        asked.append((port, text))
        times: Iterable[tuple[str, Any]] = {"ttft_s": (0.2 if port == 2 else 0.1) + len(asked) * 1e-6}.items()
        return type("Answer", (), dict(times) | {"prompt_tokens": 10 + len(text)})()

    monkeypatch.setattr(client, "ask", ask)
    found = asyncio.run(guard_ttft.measure({"off": 1, "on": 2}, "m", ["a", "bb", "ccc"]))
    assert asked == [(2, "a"), (1, "a"), (1, "bb"), (2, "bb"), (2, "ccc"), (1, "ccc")]
    assert (found.prompts, found.prompt_tokens) == (3, 12)
    assert found.added_ms == pytest.approx(100, abs=0.1)
    assert found.off_ms == pytest.approx(100, abs=0.1)
