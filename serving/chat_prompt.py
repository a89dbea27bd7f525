"""A chat request made ready for the engine: messages to prompt, tools and formats to grammar."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, replace
from typing import Any

from edgellm.chat.json_schema import json_object_gbnf, schema_to_gbnf, tool_call_gbnf
from edgellm.chat.tool_calls import ToolCallFormat, ToolCallParser, detect_format, lazy_patterns
from edgellm.engine.loaded import LoadedModel
from edgellm.engine.types import GenerateRequest, Grammar
from edgellm.errors import RequestError, SchemaError
from serving.generation import token_budget
from serving.service import Leased, Service
from serving.wire.chat import ChatCompletionRequest
from serving.wire.messages import AssistantMessage, text_of
from serving.wire.sampling import SEEDS
from serving.wire.tools import AllowedToolsChoice, JsonSchemaResponseFormat, NamedToolChoice

_CHARS_PER_TOKEN = 16  # of a prediction: more text than this for each token of the context is not looked at
_TEMPLATE_ARGUMENTS = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message"})


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """Which tools the model sees, and what it may do with them."""

    tools: tuple[dict[str, Any], ...] = ()
    forced: bool = False
    name: str | None = None  # the one it must call


def plan_tools(request: ChatCompletionRequest) -> ToolPlan:
    """Reads `tools` and `tool_choice`. With "none" the model is not shown the tools at all."""
    choice = request.tool_choice
    tools = tuple(tool.model_dump(exclude_unset=True) for tool in request.tools or ())
    if not tools or choice == "none":
        return ToolPlan()
    if isinstance(choice, NamedToolChoice):
        return ToolPlan(tools, forced=True, name=choice.function.name)
    if isinstance(choice, AllowedToolsChoice):
        names = {allowed.function.name for allowed in choice.allowed_tools.tools}
        allowed = tuple(tool for tool in tools if tool["function"]["name"] in names)
        return ToolPlan(allowed, forced=choice.allowed_tools.mode == "required")
    return ToolPlan(tools, forced=choice == "required")


@dataclass(frozen=True, slots=True)
class ChatJob:
    """What the engine is asked, and how its answer is read."""

    request: GenerateRequest
    format: ToolCallFormat | None  # None: the answer is content, whatever it looks like
    parallel: bool

    def parser(self) -> ToolCallParser | None:
        """A parser for one answer's tool calls, if there can be any."""
        return ToolCallParser(self.format, parallel=self.parallel) if self.format else None


async def prepare_chat(service: Service, leased: Leased, request: ChatCompletionRequest) -> ChatJob:
    """Renders the prompt and chooses the grammar. Raises RequestError and its kin."""
    loaded = leased.loaded
    extra = request.chat_template_kwargs or {}
    if taken := sorted(_TEMPLATE_ARGUMENTS & set(extra)):
        raise RequestError(f"The template variable {taken[0]!r} is not free", "chat_template_kwargs")
    plan = plan_tools(request)
    template = service.template(loaded, tools=bool(plan.tools))
    text = await template.render(
        _messages(request),
        tools=plan.tools or None,
        continue_final_message=request.continue_final_message,
        **extra,
    )
    limit = loaded.context_tokens - 1  # at least one token of answer
    add_special = not text.startswith(loaded.vocab.special_piece(loaded.vocab.bos)) if loaded.vocab.adds_bos else True
    prompt = await service.tokenize(loaded, text, limit=limit, param="messages", add_special=add_special)
    format = detect_format(template.source) if plan.tools and (plan.forced or not _wants_json(request)) else None
    if plan.tools or isinstance(request.response_format, JsonSchemaResponseFormat):
        grammar = await asyncio.to_thread(_grammar, request, plan, format)  # a large schema takes a while
    else:
        grammar = _grammar(request, plan, format)
    param = "max_completion_tokens" if request.max_completion_tokens is not None else "max_tokens"
    budget = token_budget(request.limit_tokens, len(prompt), loaded.context_tokens, param)
    wanted = build_request(loaded, leased, request, prompt, budget, grammar, request.logprob_count)
    return ChatJob(
        replace(wanted, prediction=await _prediction(loaded, request)),
        format,
        request.parallel_tool_calls,
    )


async def _prediction(loaded: LoadedModel, request: ChatCompletionRequest) -> tuple[int, ...]:
    """The tokens of the text that the client expects. What lies beyond the context is of no use."""
    if request.prediction is None or loaded.runner.speculator is None:
        return ()
    limit = loaded.context_tokens
    text = text_of(request.prediction.content)[: limit * _CHARS_PER_TOKEN]
    tokens = await asyncio.to_thread(loaded.vocab.tokenize, text, add_special=False, parse_special=False)
    return tuple(tokens[:limit])


def build_request(
    loaded: LoadedModel,
    leased: Leased,
    request: Any,
    prompt: tuple[int, ...],
    budget: int,
    grammar: Grammar | None,
    top_logprobs: int | None,
    n: int | None = None,
) -> GenerateRequest:
    """The engine's request for a GenerationRequest whose prompt is known."""
    unknown = next((token for token in request.logit_bias or () if int(token) >= loaded.vocab.n_tokens), None)
    if unknown is not None:
        raise RequestError(f"The model has no token {unknown}", "logit_bias")
    return GenerateRequest(
        prompt=prompt,
        max_tokens=budget,
        sampling=request.sampling(random_seed=secrets.randbelow(SEEDS), grammar=grammar),
        n=n or request.n,
        ignore_eos=request.ignore_eos,
        top_logprobs=top_logprobs,
        adapters=leased.models.scaled(leased.adapters + request.adapter_uses),
    )


def _messages(request: ChatCompletionRequest) -> list[dict[str, Any]]:
    messages = []
    for message in request.messages:
        data = message.model_dump(exclude_none=True)
        if data["role"] == "developer":
            data["role"] = "system"  # what it is called by every template that is not OpenAI's
        if isinstance(message, AssistantMessage) and message.content is None and message.refusal is not None:
            data["content"] = message.refusal
        messages.append(data)
    return messages


def _wants_json(request: ChatCompletionRequest) -> bool:
    return request.response_format is not None and request.response_format.type != "text"


def _grammar(request: ChatCompletionRequest, plan: ToolPlan, format: ToolCallFormat | None) -> Grammar | None:
    if request.grammar is not None:
        return Grammar(request.grammar)
    if plan.tools and format:
        if plan.forced:
            return Grammar(
                tool_call_gbnf(plan.tools, format=format, name=plan.name, parallel=request.parallel_tool_calls)
            )
        return _lazy_grammar(request, plan, format)
    match request.response_format:
        case JsonSchemaResponseFormat(json_schema=wanted):
            try:
                return Grammar(schema_to_gbnf(wanted.schema_ or {"type": "object"}, strict=wanted.strict is not False))
            except SchemaError as error:
                error.param = "response_format.json_schema.schema"
                raise
        case None:
            return None
        case other:
            return Grammar(json_object_gbnf()) if other.type == "json_object" else None


def _lazy_grammar(request: ChatCompletionRequest, plan: ToolPlan, format: ToolCallFormat) -> Grammar | None:
    """Once the model begins a call of its own accord, the grammar keeps the call valid. Tools whose schemas cannot be
    expressed are left to the model: nobody asked for a guarantee."""
    patterns = lazy_patterns(format)
    if not patterns or any(tool["function"].get("strict") is False for tool in plan.tools):
        return None
    try:
        gbnf = tool_call_gbnf(plan.tools, format=format, parallel=request.parallel_tool_calls)
    except SchemaError:
        return None
    return Grammar(gbnf, lazy_patterns=patterns)
