"""Chat messages (plain dicts, as in the OpenAI wire format) made fit for a template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]

TOOLS_PROMPT = """\
You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
"""What a model whose template knows no tools is told, in the words and tags of the Hermes format."""


def text_of(content: object) -> str:
    """A message's content as text: a string as it is, text parts joined by line breaks, None as nothing."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [
            part if isinstance(part, str) else part.get("text") for part in content if isinstance(part, str | dict)
        ]
        return "\n".join(text for text in texts if isinstance(text, str))
    return ""


def prepared(messages: Sequence[Message], *, as_parts: bool = False) -> list[Message]:
    """Copies with text content (or, `as_parts`, a list of one text part) and the arguments of tool calls parsed."""
    out = []
    for message in messages:
        text = text_of(message.get("content"))
        copy = {**message, "content": [{"type": "text", "text": text}] if as_parts else text}
        if isinstance(calls := message.get("tool_calls"), list) and calls:
            copy["tool_calls"] = [_parsed_call(call) for call in calls]
        else:
            copy.pop("tool_calls", None)
        out.append(copy)
    return out


def _parsed_call(call: object) -> object:
    """Templates expect the arguments as an object; the wire format has them as its JSON text."""
    if not isinstance(call, dict) or not isinstance(function := call.get("function"), dict):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
        if isinstance(parsed, dict):
            return {**call, "function": {**function, "arguments": parsed}}
    return call


def with_short_ids(messages: Sequence[Message]) -> list[Message]:
    """Copies whose tool call ids are cut to their last 9 characters, as Mistral's templates insist."""
    out = []
    for message in messages:
        copy = dict(message)
        if isinstance(call_id := copy.get("tool_call_id"), str):
            copy["tool_call_id"] = call_id[-9:]
        if isinstance(calls := copy.get("tool_calls"), list):
            copy["tool_calls"] = [
                {**call, "id": call["id"][-9:]} if isinstance(call, dict) and isinstance(call.get("id"), str) else call
                for call in calls
            ]
        out.append(copy)
    return out


def tools_as_text(messages: Sequence[Message], tools: Sequence[Message] | None) -> list[Message]:
    """The conversation for a template without tools: all in the text of system, user and assistant messages.

    The tools are listed in the system message, calls become `<tool_call>` text of the assistant, results
    `<tool_response>` text of the user, those in a row in one message.
    """
    out: list[Message] = []
    if tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        out.append({"role": "system", "content": TOOLS_PROMPT.format(tools=listed)})
    after_result = False
    for message in messages:
        role, text = message.get("role"), text_of(message.get("content"))
        if role == "system" and len(out) == 1 and tools and message is messages[0]:
            out[0]["content"] = f"{text}\n\n{out[0]['content']}" if text else out[0]["content"]
        elif role == "tool":
            answer = f"<tool_response>\n{text}\n</tool_response>"
            if after_result:
                out[-1]["content"] += f"\n{answer}"
            else:
                out.append({"role": "user", "content": answer})
        elif role == "assistant" and message.get("tool_calls"):
            calls = [_call_text(call) for call in message["tool_calls"]]
            out.append({"role": "assistant", "content": "\n".join([text, *calls] if text else calls)})
        else:
            out.append(dict(message))
        after_result = role == "tool"
    return out


def _call_text(call: Any) -> str:
    function = call.get("function", {}) if isinstance(call, dict) else {}
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    name = json.dumps(function.get("name", ""), ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {text}}}\n</tool_call>'


def system_as_user(messages: Sequence[Message]) -> list[Message]:
    """The conversation for a template without system messages: their text opens the next user message."""
    out: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        if message.get("role") == "system":
            waiting.append(text_of(message.get("content")))
        elif waiting and message.get("role") == "user":
            out.append({**message, "content": "\n\n".join([*waiting, text_of(message.get("content"))])})
            waiting = []
        else:
            out.append(dict(message))
    if waiting:
        out.append({"role": "user", "content": "\n\n".join(waiting)})
    return out
