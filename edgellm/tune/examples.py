"""Training examples as OpenAI's fine-tuning API has them: one JSON object, checked and made fit for a chat template.

Formats: "supervised", {"messages", "tools"?, "parallel_tool_calls"?}, and "dpo", {"input": {"messages", ...},
"preferred_output", "non_preferred_output"}, each output one message of the assistant. Only text is taken, and unknown
keys are refused: a misspelt `weight` would train what was to be left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from edgellm.chat.messages import Message
from edgellm.tune.faults import ExampleError

Method = Literal["supervised", "dpo"]
TOOLS_MAX = 128
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_KEYS: dict[str, frozenset[str]] = {
    "system": frozenset({"role", "content", "name"}),
    "developer": frozenset({"role", "content", "name"}),
    "user": frozenset({"role", "content", "name"}),
    "assistant": frozenset({"role", "content", "name", "refusal", "tool_calls", "weight"}),
    "tool": frozenset({"role", "content", "tool_call_id"}),
}
_CONVERSATION = frozenset({"messages", "tools", "parallel_tool_calls"})
_PAIR = frozenset({"input", "preferred_output", "non_preferred_output"})


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation whose last message is the assistant's. `trained`: indices of the answers to learn, ascending."""

    messages: tuple[Message, ...]
    trained: tuple[int, ...]
    tools: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class Preference:
    """Two conversations that differ in their last answer alone."""

    preferred: Conversation
    rejected: Conversation


Example = Conversation | Preference


def parse_example(line: bytes, method: Method) -> Example:
    """The example that a line of a training file holds. Raises ExampleError, which says what is wrong and where."""
    data = _object(_json(line), "The example")
    if method == "dpo":
        return _preference(data)
    if "preferred_output" in data or "non_preferred_output" in data:
        _wrong("has the format of the method 'dpo', but the method is 'supervised'")
    _only(data, _CONVERSATION, "")
    _flag(data, "parallel_tool_calls", "")
    messages, trained = _messages(data.get("messages"), "messages")
    if messages[-1]["role"] != "assistant":
        _wrong(f"messages[{len(messages) - 1}]: the last message must be the assistant's")
    if not trained:
        _wrong("messages: has no answer to learn; every message of the assistant has weight 0")
    return Conversation(messages, trained, _tools(data.get("tools"), "tools"))


def _preference(data: Mapping[str, Any]) -> Preference:
    if "messages" in data:
        _wrong("has the format of the method 'supervised', but the method is 'dpo'")
    _only(data, _PAIR, "")
    given = _object(data.get("input"), "input")
    _only(given, _CONVERSATION, "input.")
    _flag(given, "parallel_tool_calls", "input.")
    messages, _ = _messages(given.get("messages"), "input.messages")
    if messages[-1]["role"] == "assistant":
        _wrong("input.messages: the last message must not be the assistant's; the outputs are its answers")
    tools = _tools(given.get("tools"), "input.tools")
    answers = []
    for name in ("preferred_output", "non_preferred_output"):
        answer, _ = _messages(data.get(name), name)
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            _wrong(f"{name}: must be one message of the assistant")
        answers.append(Conversation((*messages, answer[0]), (len(messages),), tools))
    if answers[0].messages[-1] == answers[1].messages[-1]:
        _wrong("preferred_output and non_preferred_output are the same")
    return Preference(*answers)


def _json(line: bytes) -> Any:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        _wrong(f"is not UTF-8 (byte {error.start + 1})")
    try:
        data = json.loads(text, parse_constant=_no_number)
        json.dumps(data, ensure_ascii=False).encode()  # an escaped lone surrogate is valid JSON, and no text
    except json.JSONDecodeError as error:
        _wrong(f"is not valid JSON: {error.msg} (character {error.pos + 1})")
    except UnicodeEncodeError:
        _wrong("has a string that is not valid Unicode (a lone surrogate)")
    except RecursionError:
        _wrong("is nested too deeply")
    except ValueError:  # an integer of thousands of digits
        _wrong("has a number of too many digits")
    return data


def _no_number(name: str) -> NoReturn:
    raise ExampleError(f"has the number {name}, which JSON does not know")


def _messages(data: Any, path: str) -> tuple[tuple[Message, ...], tuple[int, ...]]:
    """The messages as a template takes them, and which of them are answers to learn."""
    if not isinstance(data, list) or not data:
        _wrong(f"{path}: must be a list of at least one message")
    messages, trained = [], []
    called: set[str] = set()
    for index, item in enumerate(data):
        where = f"{path}[{index}]"
        message, weight = _message(_object(item, where), where)
        if message["role"] == "assistant":
            called.update(call["id"] for call in message.get("tool_calls", ()))
            if weight:
                trained.append(index)
        elif message["role"] == "tool" and message["tool_call_id"] not in called:
            _wrong(f"{where}.tool_call_id: no tool call before it has this id")
        messages.append(message)
    return tuple(messages), tuple(trained)


def _message(data: Mapping[str, Any], where: str) -> tuple[Message, int]:
    """A message with the keys in the order in which the server's own requests have them, and its weight."""
    role = data.get("role")
    if not isinstance(role, str) or role not in _KEYS:
        _wrong(f"{where}.role: must be one of {', '.join(_KEYS)}")
    if "function_call" in data or role == "function":
        _wrong(f"{where}.function_call: is no longer taken; use tool_calls")
    _only(data, _KEYS[role], f"{where}.")
    message: Message = {"role": "system" if role == "developer" else role}
    content = None if data.get("content") is None else _text(data["content"], f"{where}.content")
    if role == "assistant":
        weight = _answer(data, content, message, where)
    else:
        if content is None:
            _wrong(f"{where}.content: is missing")
        message["content"], weight = content, 0
    if data.get("name") is not None:
        message["name"] = _string(data["name"], f"{where}.name")
    if role == "tool":
        message["tool_call_id"] = _string(data.get("tool_call_id"), f"{where}.tool_call_id")
    return message, weight


def _answer(data: Mapping[str, Any], content: str | None, message: Message, where: str) -> int:
    """Fill in an assistant's message; its weight."""
    weight = data.get("weight")
    if weight is not None and (type(weight) is not int or weight not in (0, 1)):
        _wrong(f"{where}.weight: must be 0 or 1")
    calls = _tool_calls(data.get("tool_calls"), f"{where}.tool_calls")
    if content is None and data.get("refusal") is not None:
        content = _string(data["refusal"], f"{where}.refusal")
    if not calls and not (content or "").strip():
        _wrong(f"{where}: is an empty answer")
    if content is not None:
        message["content"] = content
    if calls:
        message["tool_calls"] = calls
    return 1 if weight is None else int(weight)


def _text(data: Any, where: str) -> str:
    """Text as it is, text parts as one string, joined as the server joins them."""
    if isinstance(data, str):
        return data
    if not isinstance(data, list) or not data:
        _wrong(f"{where}: must be a string or a list of text parts")
    texts = []
    for index, item in enumerate(data):
        part = _object(item, f"{where}[{index}]")
        if part.get("type") != "text":
            _wrong(f"{where}[{index}].type: must be text; the model takes nothing else")
        _only(part, frozenset({"type", "text"}), f"{where}[{index}].")
        texts.append(_string(part.get("text"), f"{where}[{index}].text", empty=True))
    return "\n".join(texts)


def _tool_calls(data: Any, where: str) -> list[Message]:
    if data is None:
        return []
    if not isinstance(data, list) or not 0 < len(data) <= TOOLS_MAX:
        _wrong(f"{where}: must be a list of 1 to {TOOLS_MAX} calls")
    calls = []
    for index, item in enumerate(data):
        at = f"{where}[{index}]"
        call = _object(item, at)
        _only(call, frozenset({"id", "type", "function"}), f"{at}.")
        if call.get("type") != "function":
            _wrong(f"{at}.type: must be function")
        function = _object(call.get("function"), f"{at}.function")
        _only(function, frozenset({"name", "arguments"}), f"{at}.function.")
        arguments = _string(function.get("arguments"), f"{at}.function.arguments", empty=True)
        try:
            _object(json.loads(arguments), at)
        except (ValueError, RecursionError, ExampleError):
            _wrong(f"{at}.function.arguments: must be a JSON object as text")
        name = _string(function.get("name"), f"{at}.function.name")
        calls.append(
            {
                "id": _string(call.get("id"), f"{at}.id"),
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
        )
    return calls


def _tools(data: Any, where: str) -> tuple[Message, ...]:
    """The tools, their keys in the order in which the server writes those of a request into the prompt."""
    if data is None:
        return ()
    if not isinstance(data, list) or len(data) > TOOLS_MAX:
        _wrong(f"{where}: must be a list of at most {TOOLS_MAX} tools")
    tools = []
    for index, item in enumerate(data):
        at = f"{where}[{index}]"
        tool = _object(item, at)
        _only(tool, frozenset({"type", "function"}), f"{at}.")
        if tool.get("type") != "function":
            _wrong(f"{at}.type: must be function")
        function = _object(tool.get("function"), f"{at}.function")
        _only(function, frozenset({"name", "description", "parameters", "strict"}), f"{at}.function.")
        if not _TOOL_NAME.fullmatch(_string(function.get("name"), f"{at}.function.name")):
            _wrong(f"{at}.function.name: must be 1 to 64 letters, digits, _ or -")
        if function.get("description") is not None:
            _string(function["description"], f"{at}.function.description", empty=True)
        if function.get("parameters") is not None:
            _object(function["parameters"], f"{at}.function.parameters")
        _flag(function, "strict", f"{at}.function.")
        kept = {key: function[key] for key in ("name", "description", "parameters", "strict") if key in function}
        tools.append({"type": "function", "function": kept})
    return tuple(tools)


def _object(data: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        _wrong(f"{where}: must be an object")
    return data


def _string(data: Any, where: str, *, empty: bool = False) -> str:
    if not isinstance(data, str) or not (data or empty):
        _wrong(f"{where}: must be a string{'' if empty else ' that is not empty'}")
    return data


def _flag(data: Mapping[str, Any], key: str, prefix: str) -> None:
    if data.get(key) is not None and not isinstance(data[key], bool):
        _wrong(f"{prefix}{key}: must be true or false")


def _only(data: Mapping[str, Any], known: frozenset[str], prefix: str) -> None:
    unknown = next((key for key in data if key not in known), None)
    if unknown is not None:
        _wrong(f"{prefix}{unknown[:60]}: is not known here")


def _wrong(message: str) -> NoReturn:
    raise ExampleError(message)
