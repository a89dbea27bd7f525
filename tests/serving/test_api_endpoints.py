"""Text completions, embeddings, models, adapters, health and metrics, on real servers."""

from __future__ import annotations

import base64
import math
from pathlib import Path

import numpy as np
import openai
import pytest

from tests.serving.server import Server
from tests.support.tiny_gguf import write_tiny_lora

MODEL = "smollm2-135m-instruct"
PROMPT = "The capital of France is"


def test_a_completion_of_a_text(client):
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=3, temperature=0)
    assert answer.object == "text_completion"
    [choice] = answer.choices
    assert choice.text.startswith(" Paris")
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 3


def test_several_prompts_answer_in_order(client):
    prompts = [PROMPT, "The capital of Italy is"]
    answer = client.completions.create(model=MODEL, prompt=prompts, max_tokens=1, temperature=0, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [" Paris", " Paris", " Rome", " Rome"]
    single = client.completions.create(model=MODEL, prompt=prompts[1], max_tokens=1, temperature=0)
    assert answer.usage.prompt_tokens > single.usage.prompt_tokens


def test_token_ids_are_the_text_they_stand_for(tiny_client):
    asked = {"model": "tiny", "max_tokens": 5, "temperature": 0}
    ids = list(b"xyz")  # the tiny vocabulary begins with the bytes
    text = tiny_client.completions.create(prompt="xyz", **asked)
    assert tiny_client.completions.create(prompt=ids, **asked).choices[0].text == text.choices[0].text
    several = tiny_client.completions.create(prompt=[ids, ids], **asked)
    assert [choice.text for choice in several.choices] == [text.choices[0].text] * 2


def test_echo_puts_the_prompt_first(client):
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=1, temperature=0, echo=True)
    assert answer.choices[0].text == PROMPT + " Paris"


def test_completion_logprobs_are_parallel_lists(client):
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=4, temperature=0, logprobs=2)
    choice = answer.choices[0]
    found = choice.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 4
    assert "".join(found.tokens) == choice.text
    assert found.text_offset == [sum(map(len, found.tokens[:i])) for i in range(4)]
    for token, value, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert value == pytest.approx(max(top.values()), abs=1e-4)
        assert token in top
        assert len(top) == 2


def test_best_of_returns_the_likeliest(client):
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "temperature": 1.5, "seed": 3, "logprobs": 0}
    every = client.completions.create(n=4, **asked)
    best = client.completions.create(best_of=4, **asked)
    [choice] = best.choices
    assert choice.index == 0
    means = {item.text: sum(item.logprobs.token_logprobs) / len(item.logprobs.tokens) for item in every.choices}
    assert choice.text == max(means, key=means.__getitem__)
    assert best.usage.completion_tokens == every.usage.completion_tokens


def test_a_completion_stream(client):
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    *chunks, last = client.completions.create(stream=True, stream_options={"include_usage": True}, **asked)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.choices == []
    assert last.usage.completion_tokens == 6


def test_a_suffix_is_refused_where_the_model_knows_none(client):
    with pytest.raises(openai.BadRequestError, match="fill in the middle"):
        client.completions.create(model=MODEL, prompt="def f(", suffix="):", max_tokens=2)


def test_embeddings_are_unit_vectors_in_the_inputs_order(client):
    one = client.embeddings.create(model=MODEL, input="a cat on a mat", encoding_format="float")
    two = client.embeddings.create(model=MODEL, input=["stocks fell", "a cat on a mat"], encoding_format="float")
    assert [item.index for item in two.data] == [0, 1]
    vector = np.array(one.data[0].embedding)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-3)
    assert vector @ np.array(two.data[1].embedding) == pytest.approx(1, abs=1e-3)
    assert vector @ np.array(two.data[0].embedding) < 0.99
    assert one.usage.prompt_tokens == one.usage.total_tokens > 0


def test_embeddings_of_tokens_as_base64_and_shortened(tiny: Server, tiny_client):
    text = tiny_client.embeddings.create(model="tiny", input="xyz", encoding_format="float").data[0].embedding
    ids = list(b"xyz")
    for given in (ids, [ids]):
        found = tiny_client.embeddings.create(model="tiny", input=given, encoding_format="float")
        assert found.data[0].embedding == pytest.approx(text, abs=1e-5)
    raw = tiny.post("/v1/embeddings", {"input": "xyz", "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(raw), "<f4") == pytest.approx(text, abs=1e-6)
    default = tiny_client.embeddings.create(model="tiny", input="xyz")  # the client asks for base64 by itself
    assert default.data[0].embedding == pytest.approx(text, abs=1e-6)
    short = tiny_client.embeddings.create(model="tiny", input="xyz", dimensions=8, encoding_format="float")
    cut = np.array(text[:8])
    assert short.data[0].embedding == pytest.approx(cut / np.linalg.norm(cut), abs=1e-5)


def test_a_text_too_long_to_embed_gets_both_numbers(tiny_client):
    with pytest.raises(openai.BadRequestError) as caught:
        tiny_client.embeddings.create(model="tiny", input=[65] * 600)
    assert caught.value.code == "context_length_exceeded"
    assert "600" in str(caught.value)
    assert "512" in str(caught.value)


def test_models_are_listed_and_shown(client, smol: Server):
    listed = client.models.list().data
    assert [model.id for model in listed] == [MODEL]
    shown = client.models.retrieve(MODEL)
    assert (shown.id, shown.object, shown.owned_by) == (MODEL, "model", "edgellm")
    assert shown.model_dump()["loaded"] is True
    for missing in ("none-such", "owner/none-such", "a/b/c"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve(missing)
        assert caught.value.code == "model_not_found"


def test_health_and_documentation(smol: Server):
    health = smol.get("/health").json()
    assert health["status"] == "ok"
    assert health["models_loaded"] == [MODEL]
    assert "text/html" in smol.get("/docs").headers["content-type"]
    paths = smol.get("/openapi.json").json()["paths"]
    texts = {"chat/completions", "completions", "embeddings"}
    wanted = texts | {"models", "models/{model_id}", "adapters", "adapters/{name}"}
    assert {f"/v1/{path}" for path in wanted} | {"/health", "/metrics"} <= set(paths)


COUNTED = {
    "edgellm_generated_tokens_total": 5,
    "edgellm_time_to_first_token_seconds_count": 1,
    "edgellm_inter_token_seconds_count": 4,
    "edgellm_request_seconds_count": 1,
    "edgellm_prefix_lookups_total": 1,
}


def test_metrics_move_with_a_request(tiny: Server):
    names = {**COUNTED, "edgellm_prompt_tokens_total": None}
    before = {name: tiny.metric(name, model="tiny") for name in names}
    requests = tiny.metric("edgellm_http_requests_total", endpoint="/v1/completions", status="200")
    body = {"prompt": "hello world", "max_tokens": 5, "ignore_eos": True}
    usage = tiny.post("/v1/completions", body).json()["usage"]
    moved = {name: tiny.metric(name, model="tiny") - before[name] for name in names}
    assert moved == {**COUNTED, "edgellm_prompt_tokens_total": usage["prompt_tokens"]}
    assert tiny.metric("edgellm_http_requests_total", endpoint="/v1/completions", status="200") == requests + 1
    text = tiny.get("/metrics").text
    for name in ("queued_requests", "active_sequences", "kv_cells_used", "kv_cells", "prefix_hits_total"):
        assert f'edgellm_{name}{{model="tiny"}}' in text
    for name in ("preemptions_total", "engine_step_seconds_total", "engine_decode_seconds_total"):
        assert f'edgellm_{name}{{model="tiny"}}' in text


def test_an_adapters_life(tiny: Server, tiny_client, tiny_model: Path, tmp_path: Path):
    path = write_tiny_lora(tmp_path / "lora.gguf", tiny_model, magnitude=1.0)
    asked = {"max_tokens": 1, "temperature": 0, "logprobs": 0, "prompt": "hello world"}

    def ask(model: str = "tiny", **extension: object) -> float:
        found = tiny_client.completions.create(model=model, extra_body=extension, **asked).choices[0]
        return found.logprobs.token_logprobs[0]

    plain = ask()
    answer = tiny.post("/v1/adapters", {"name": "mine", "path": str(path)})
    assert answer.status_code == 200, answer.text
    assert (answer.json()["id"], answer.json()["model"]) == ("mine", "tiny")
    assert [item["id"] for item in tiny.get("/v1/adapters").json()["data"]] == ["mine"]
    assert "mine" in [model.id for model in tiny_client.models.list()]
    adapted = ask(adapter="mine")
    assert not math.isclose(adapted, plain, abs_tol=1e-3)
    assert ask("mine") == pytest.approx(adapted, abs=1e-3)
    assert ask(adapters=[{"name": "mine", "scale": 1}]) == pytest.approx(adapted, abs=1e-3)
    assert ask(adapters=[{"name": "mine", "scale": 0}]) == pytest.approx(plain, abs=1e-3)
    assert ask() == pytest.approx(plain, abs=1e-3)  # nothing of it is left behind
    deleted = tiny_client.delete("/adapters/mine", cast_to=object)
    assert deleted == {"id": "mine", "object": "adapter", "deleted": True}
    with pytest.raises(openai.NotFoundError):
        tiny_client.delete("/adapters/mine", cast_to=object)
    with pytest.raises(openai.NotFoundError) as caught:
        ask(adapter="mine")
    assert caught.value.code == "adapter_not_found"
    assert tiny.get("/v1/adapters").json()["data"] == []
