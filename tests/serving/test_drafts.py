"""Drafts over HTTP: answers as without, counts in usage and metrics, predictions, and how all that is forgotten."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.serving.server import START_S, Server, run_edgellm, serving
from tests.support.tiny_gguf import write_tiny_llama

CODE = "def area(width, height):\n    return width * height\n\n\nprint(area(3, 4))\nprint(area(5, 6))\n"
COPY = [{"role": "user", "content": f"Repeat this code exactly, and say nothing else:\n\n{CODE}"}]


def make_rows_free(home: Path) -> None:
    """Edits what was learned there: further rows of a step cost nothing, so that likely drafts are always verified."""
    (path,) = home.glob("speculative/*/learned.json")
    learned = json.loads(path.read_bytes())
    learned["steps"] = dict.fromkeys(learned["steps"], 0.001)
    path.write_text(json.dumps(learned))


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("drafting")
    with serving(home) as server:
        server.terminate()
        assert server.wait() == 0
    make_rows_free(home)
    with serving(home) as server:
        yield server


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("plain"), "--draft", "none") as server:
        yield server


def _ask(server: Server, **fields: object) -> dict:
    body = {"messages": COPY, "temperature": 0, "max_tokens": 60, **fields}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def _drafted(answer: dict) -> tuple[int, int]:
    details = answer["usage"]["completion_tokens_details"]
    return details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]


def test_the_text_is_that_of_a_server_that_does_not_draft(drafting, plain):
    expected, found = _ask(plain), _ask(drafting)
    assert found["choices"] == expected["choices"]
    assert _drafted(expected) == (0, 0)
    accepted, _ = _drafted(found)
    assert 0 < accepted < found["usage"]["completion_tokens"]


def test_a_prediction_is_drafted_from(drafting):
    messages = [{"role": "user", "content": "Say hello in one short sentence."}]
    drafting.delete("/v1/drafts")
    text = _ask(drafting, messages=messages)["choices"][0]["message"]["content"]
    drafting.delete("/v1/drafts")
    answer = _ask(drafting, messages=messages, prediction={"type": "content", "content": text})
    assert answer["choices"][0]["message"]["content"] == text
    assert _drafted(answer)[0] >= 3


def test_openais_client_sends_predictions(drafting):
    with openai.OpenAI(base_url=drafting.api, api_key="unused", max_retries=0, timeout=START_S) as client:
        answer = client.chat.completions.create(
            model="smollm2-135m-instruct",
            messages=COPY,
            temperature=0,
            max_tokens=40,
            prediction={"type": "content", "content": [{"type": "text", "text": CODE}]},
        )
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens > 0


def test_an_answer_that_a_stop_text_ends_counts_its_drafts(drafting):
    _ask(drafting)  # so that the next one is known
    accepted, _ = _drafted(_ask(drafting, stop=["(3"]))
    assert accepted > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 3, "temperature": 0.8, "seed": 5, "top_k": 4},
        {"logprobs": True, "top_logprobs": 2},
        {"presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"logit_bias": {"198": -3}},
        {"response_format": {"type": "json_object"}},
        {"grammar": 'root ::= ("def " | "print" | [a-z ,().*\\n])+'},
    ],
)
def test_whatever_shapes_the_answer_shapes_it_as_without_drafts(drafting, plain, fields):
    # A prompt that neither has seen: what a cache holds of it was computed in other steps, which rounds differently.
    messages = [{"role": "system", "content": f"Be {min(fields)}."}, *COPY]
    expected, found = (_ask(server, messages=messages, **fields) for server in (plain, drafting))
    for mine, theirs in zip(found["choices"], expected["choices"], strict=True):
        assert mine["message"] == theirs["message"]
        assert mine["finish_reason"] == theirs["finish_reason"]
        if "logprobs" in fields:
            pairs = zip(mine["logprobs"]["content"], theirs["logprobs"]["content"], strict=True)
            assert all(a["token"] == b["token"] and abs(a["logprob"] - b["logprob"]) < 0.1 for a, b in pairs)


def test_figures_add_up_in_metrics_and_in_spec_stats(drafting, tmp_path):
    before = {n: drafting.metric(f"edgellm_draft_{n}_tokens_total") for n in ("accepted", "rejected")}
    accepted, rejected = _drafted(_ask(drafting))
    assert drafting.metric("edgellm_draft_accepted_tokens_total", proposer="lookup") == before["accepted"] + accepted
    assert drafting.metric("edgellm_draft_rejected_tokens_total", proposer="lookup") == before["rejected"] + rejected
    assert drafting.metric("edgellm_drafting") == 1
    done = run_edgellm(tmp_path, "spec", "stats", "--url", drafting.url, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)["smollm2-135m-instruct"]
    assert facts["drafting"] is True
    assert facts["target_tokens"] > facts["target_calls"] > 0
    assert facts["proposers"]["lookup"]["accepted"] == before["accepted"] + accepted
    table = run_edgellm(tmp_path, "spec", "stats", "--url", drafting.url)
    assert "tokens a target call" in table.stdout
    assert "lookup" in table.stdout


def test_a_server_that_does_not_draft_says_why(plain, tmp_path):
    _ask(plain)
    assert plain.metric("edgellm_drafting", reason="switched off by --draft none") == 0
    done = run_edgellm(tmp_path, "spec", "stats", "--url", plain.url)
    assert "nothing is drafted: switched off by --draft none" in done.stdout
    assert not list(plain.home.glob("speculative/*"))


def test_what_was_learned_survives_a_restart_and_is_forgotten_on_demand(tmp_path):
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    home = tmp_path / "home"
    with serving(home, "--model", str(model)) as server:
        server.post("/v1/completions", {"prompt": "aaaa", "max_tokens": 60, "temperature": 0})
        server.terminate()
        assert server.wait() == 0
    learned = json.loads((home / "speculative" / "tiny" / "learned.json").read_bytes())
    assert learned["weights"]["lookup"]
    with serving(home, "--model", str(model)) as server:
        server.assert_alive()
        done = run_edgellm(home, "spec", "forget", "--url", server.url)
        assert done.returncode == 0, done.stderr
        assert "has forgotten" in done.stdout
        assert not (home / "speculative").exists()
    done = run_edgellm(home, "spec", "forget", "--url", "http://127.0.0.1:9")
    assert done.returncode == 0
    assert "no server answers" in done.stdout


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"version": 1, "steps": {"1": "x"}}', b'{"version": 99}'])
def test_damaged_learning_is_no_obstacle(tmp_path, damage):
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    folder = tmp_path / "speculative" / "tiny"
    folder.mkdir(parents=True)
    (folder / "learned.json").write_bytes(damage)
    with serving(tmp_path, "--model", str(model)) as server:
        server.assert_alive()


@pytest.mark.parametrize(
    ("prediction", "param"),
    [
        ({"type": "content"}, "prediction.content"),
        ({"type": "text", "content": "x"}, "prediction.type"),
        ({"type": "content", "content": 5}, "prediction.content"),
        ("x", "prediction"),
    ],
)
def test_a_faulty_prediction_is_refused(drafting, prediction, param):
    answer = drafting.post("/v1/chat/completions", {"messages": COPY, "prediction": prediction})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param)


def test_a_prediction_longer_than_the_context_is_cut(drafting):
    prediction = {"type": "content", "content": "word " * 200_000}
    assert _ask(drafting, max_tokens=5, prediction=prediction)["choices"]
