"""A model's chat template: messages in, the prompt's text out. The template itself runs in a process of its own."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from edgellm.chat.messages import Message, prepared, system_as_user, text_of, tools_as_text, with_short_ids
from edgellm.chat.template_process import TemplateProcess, TemplateUnusableError
from edgellm.errors import ChatTemplateError

_log = logging.getLogger(__name__)

OUTPUT_BYTES = 16 << 20
_OURS = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "raise_exception", "strftime_now")

CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""The template of models that bring none. Most small models have seen its markers; some have not and answer oddly."""


@dataclass(frozen=True, slots=True)
class TemplateCaps:
    """What a template does with what it is given, found out by trying."""

    system: bool  # the text of a system message appears
    tools: bool  # the tools appear
    tool_calls: bool  # an assistant's tool calls appear
    tool_role: bool  # the text of a tool message appears
    parts: bool  # content must be a list of parts: a plain string does not appear


class ChatTemplate:
    """Renders one template. What the template cannot do is put into plain messages (see `messages.tools_as_text`)."""

    def __init__(
        self,
        source: str | None,
        *,
        bos_token: str,
        eos_token: str,
        timeout_s: float = 2.0,
        output_bytes: int = OUTPUT_BYTES,
    ) -> None:
        """`source` is Jinja text; None, for a model that has none, means CHATML. Nothing is started yet.

        `timeout_s` and `output_bytes` bound each render.
        """
        self.is_default = source is None
        if source is None:
            _log.warning("The model has no chat template; ChatML is used, which it may not know.")
        self.source = CHATML if source is None else source
        self._process = TemplateProcess(
            self.source, bos_token=bos_token, eos_token=eos_token, timeout_s=timeout_s, output_bytes=output_bytes
        )
        self._caps: TemplateCaps | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The process that renders, once there is one."""
        return self._process.pid

    def close(self) -> None:
        """End the process. Nothing can be rendered afterwards."""
        self._process.close()

    async def render(
        self,
        messages: Sequence[Message],
        /,
        *,
        tools: Sequence[Message] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **extra: Any,
    ) -> str:
        """`render_sync` in a thread, so that the event loop goes on."""
        return await asyncio.to_thread(
            self.render_sync,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **extra,
        )

    def render_sync(
        self,
        messages: Sequence[Message],
        /,
        *,
        tools: Sequence[Message] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **extra: Any,
    ) -> str:
        """The prompt. `extra` are further variables for the template, such as `enable_thinking`.

        `continue_final_message` ends the prompt right after the text of the last message, which must be the
        assistant's, for the model to go on from there. Raises ChatTemplateError with the template's own words.
        """
        if taken := sorted(set(extra) & set(_OURS)):
            raise ChatTemplateError(f"The variable {taken[0]!r} is not free", "chat_template_kwargs")
        marker = ""
        if continue_final_message:
            messages, marker = _marked(messages)
            add_generation_prompt = False
        text = self._render_adapted(messages, tools or None, add_generation_prompt, extra)
        if marker:
            text, found, _ = text.rpartition(marker)
            if not found:
                raise ChatTemplateError("The chat template drops the final message, which can't be continued")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ChatTemplateError("The messages hold text that is not valid Unicode", "messages") from None
        return text

    def caps(self) -> TemplateCaps:
        """What the template can do. Renders some probes the first time."""
        if self._caps is None:
            self._caps = self._probe()
        return self._caps

    def _render_adapted(
        self, messages: Sequence[Message], tools: Sequence[Message] | None, prompt: bool, extra: dict[str, Any]
    ) -> str:
        caps = self.caps()
        roles = {message.get("role") for message in messages}
        calls = any(message.get("tool_calls") for message in messages)
        unable = (
            (tools and not caps.tools) or (calls and not caps.tool_calls) or ("tool" in roles and not caps.tool_role)
        )
        if unable:
            messages = tools_as_text(messages, None if caps.tools else tools)
            tools = tools if caps.tools else None
        if "length != 9" in self.source:
            messages = with_short_ids(messages)
        if not caps.system:
            messages = system_as_user(messages)
        return self._render_plain(messages, tools, prompt, extra, as_parts=caps.parts)

    def _render_plain(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None,
        prompt: bool,
        extra: dict[str, Any],
        *,
        as_parts: bool,
    ) -> str:
        variables = {
            **extra,
            "messages": prepared(messages, as_parts=as_parts),
            "tools": None if tools is None else list(tools),
            "add_generation_prompt": prompt,
        }
        return self._process.render(variables)

    def _probe(self) -> TemplateCaps:
        user: Message = {"role": "user", "content": "probe-user"}
        parts = not self._shows("probe-user", [user], parts=False) and self._shows("probe-user", [user], parts=True)
        call = {"id": "call00000", "type": "function", "function": {"name": "probe_call", "arguments": "{}"}}
        called: list[Message] = [user, {"role": "assistant", "content": "", "tool_calls": [call]}]
        result = {"role": "tool", "tool_call_id": "call00000", "name": "probe_call", "content": "probe-result"}
        function = {"name": "probe_tool", "description": "A probe.", "parameters": {"type": "object", "properties": {}}}
        tools: list[Message] = [{"type": "function", "function": function}]
        system = {"role": "system", "content": "probe-system"}
        return TemplateCaps(
            system=self._shows("probe-system", [system, user], parts=parts),
            tools=self._shows("probe_tool", [user], tools, parts=parts),
            tool_calls=self._shows("probe_call", called, parts=parts),
            tool_role=self._shows("probe-result", [*called, result], parts=parts),
            parts=parts,
        )

    def _shows(self, needle: str, messages: list[Message], tools: list[Message] | None = None, *, parts: bool) -> bool:
        try:
            return needle in self._render_plain(messages, tools, True, {}, as_parts=parts)
        except TemplateUnusableError:
            raise
        except ChatTemplateError:
            return False  # a template may refuse what it cannot show


def caps(source: str | None, *, bos_token: str = "", eos_token: str = "") -> TemplateCaps:
    """What a template can do; see ChatTemplate.caps."""
    with ChatTemplate(source, bos_token=bos_token, eos_token=eos_token) as template:
        return template.caps()


def _marked(messages: Sequence[Message]) -> tuple[list[Message], str]:
    """The messages with a marker at the end of the last one's text, and the marker."""
    if not messages or messages[-1].get("role") != "assistant":
        raise ChatTemplateError("Only a final message of the assistant can be continued", "messages")
    marker = f"[end-{uuid.uuid4().hex}]"
    last = {**messages[-1], "content": text_of(messages[-1].get("content")) + marker}
    return [*messages[:-1], last], marker
