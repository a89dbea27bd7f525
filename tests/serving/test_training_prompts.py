"""What a training example puts before an answer is, token for token, the prompt that a request would have."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from edgellm.config import Settings
from edgellm.tune.coding import ModelCoder, encode
from edgellm.tune.examples import parse_example
from serving.chat_prompt import prepare_chat
from serving.service import Service
from serving.wire.chat import ChatCompletionRequest

TOOL = {
    "function": {"strict": True, "parameters": {"type": "object", "b": 1, "a": 2}, "name": "f", "description": "Do."},
    "type": "function",
}
CALL = {"id": "c1", "type": "function", "function": {"arguments": '{"z": 1, "a": "é"}', "name": "f"}}
USER = {"role": "user", "content": "Hi\n"}
ANSWER = {"role": "assistant", "content": " Hello."}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [USER]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]}]},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, USER]},
    "turns": {"messages": [{"role": "system", "content": "x", "name": "n"}, USER, ANSWER, USER]},
    "refusal": {"messages": [USER, {"role": "assistant", "content": None, "refusal": "No."}, USER]},
    "tools": {"messages": [USER], "tools": [TOOL]},
    "calls": {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "42", "tool_call_id": "c1"},
        ],
        "tools": [TOOL],
    },
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGELLM_HOME", str(tmp_path_factory.mktemp("home")))
        made = Service(Settings(threads=1, context_tokens=2048, packed_weights="off"))
    yield made
    made.close()


async def _both(service: Service, given: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The prompt of a request, and what an example has before its last answer."""
    async with service.lease(None) as leased:
        loaded = leased.loaded
        request = ChatCompletionRequest.model_validate_json(json.dumps({"model": "m", **given}))
        job = await prepare_chat(service, leased, request)
        coder = ModelCoder(loaded.vocab, service.template(loaded), service.template(loaded, tools=True))
        messages = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in given["messages"]]
        example = parse_example(json.dumps({**given, "messages": [*messages, ANSWER]}).encode(), "supervised")
        found = encode(example, coder)
        return list(job.request.prompt), found.tokens[: int(found.mask.argmax())].tolist()


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_prompt_is_the_same(service: Service, name: str) -> None:
    served, trained = asyncio.run(_both(service, CONVERSATIONS[name]))
    assert trained == served
