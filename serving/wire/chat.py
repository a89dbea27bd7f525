"""POST /v1/chat/completions: the request, the answer and its chunks."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import to_json

from serving.wire.common import NULL_IS_DEFAULT, JsonObject, Logprobs, ResponseModel, Usage, WirePart, fault
from serving.wire.guard import GuardReport
from serving.wire.messages import AssistantMessage, Content, Message, text_of
from serving.wire.sampling import GenerationRequest, TokenCount
from serving.wire.tools import TOOLS_MAX, AllowedToolsChoice, NamedToolChoice, ResponseFormat, Tool, ToolChoice

MESSAGES_MAX = 4096
FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class Prediction(WirePart):
    """A guess at the answer."""

    type: Literal["content"]
    content: Content


class ChatCompletionRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(
        min_length=1, max_length=MESSAGES_MAX, description="The conversation so far."
    )
    max_completion_tokens: TokenCount | None = Field(default=None, description="Most tokens to generate.")
    max_tokens: TokenCount | None = Field(default=None, description="The older name of max_completion_tokens.")
    logprobs: Annotated[bool, NULL_IS_DEFAULT] = Field(
        default=False, description="Return log-probabilities of the tokens."
    )
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="Alternatives to report at each token.")
    response_format: ResponseFormat | None = Field(
        default=None, description="Force JSON, or JSON that follows a schema."
    )
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = Field(
        default=None, max_length=TOOLS_MAX, description="Functions that the model may call."
    )
    tool_choice: ToolChoice | None = Field(default=None, description="Default: auto where there are tools, else none.")
    parallel_tool_calls: Annotated[bool, NULL_IS_DEFAULT] = Field(
        default=True, description="Allow several calls at once."
    )
    prediction: Prediction | None = Field(
        default=None,
        description="A text that much of the answer will repeat. It is drafted from, which changes only the speed.",
    )
    chat_template_kwargs: JsonObject | None = Field(
        default=None, description="Extension. Variables for the chat template."
    )
    continue_final_message: Annotated[bool, NULL_IS_DEFAULT] = Field(
        default=False,
        description="Extension. Go on with the last message, which is the assistant's, instead of answering.",
    )
    metadata: JsonObject | None = Field(default=None, description="Accepted and ignored.")
    store: bool | None = Field(default=None, description="Accepted and ignored.")
    service_tier: str | None = Field(default=None, description="Accepted and ignored.")

    @property
    def limit_tokens(self) -> int | None:
        """Most tokens to generate, where the request says."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        """As GenerateRequest.top_logprobs: None without logprobs, else the number of alternatives."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_would_be_dropped(cls, data: Any) -> Any:
        """Old or foreign features that change the answer; ignoring them would give a wrong one."""
        if not isinstance(data, dict):
            return data
        if data.get("functions") or data.get("function_call") not in (None, "none", "auto"):
            name = "functions" if data.get("functions") else "function_call"
            raise fault("is the old way to give tools; use 'tools' and 'tool_choice'", name)
        modalities = data.get("modalities")
        if isinstance(modalities, list) and any(kind != "text" for kind in modalities):
            raise fault("asks for other than text, but the model answers in text only", "modalities")
        return data

    @model_validator(mode="after")
    def _output_rules(self) -> ChatCompletionRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise fault("differs from 'max_completion_tokens'; give one of the two", "max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise fault("is only allowed when 'logprobs' is true", "top_logprobs")
        if self.continue_final_message:
            last = self.messages[-1]
            if not isinstance(last, AssistantMessage) or not text_of(last.content):
                raise fault("needs a last message from the assistant, with content", "continue_final_message")
        return self

    @model_validator(mode="after")
    def _tool_rules(self) -> ChatCompletionRequest:
        names = [tool.function.name for tool in self.tools or ()]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise fault(f"is {name!r}, which an earlier tool has already", f"tools[{index}].function.name")
        choice = self.tool_choice
        if choice not in (None, "none", "auto") and not names:
            raise fault("is only allowed when 'tools' are given", "tool_choice")
        if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
            raise fault(f"names {choice.function.name!r}, which is not among 'tools'", "tool_choice.function.name")
        if isinstance(choice, AllowedToolsChoice):
            for allowed in choice.allowed_tools.tools:
                if allowed.function.name not in names:
                    where = "tool_choice.allowed_tools.tools"
                    raise fault(f"names {allowed.function.name!r}, which is not among 'tools'", where)
        return self

    @model_validator(mode="after")
    def _one_grammar(self) -> ChatCompletionRequest:
        """A forced call, a JSON format and a grammar each dictate the whole answer: at most one of them."""
        choice = self.tool_choice
        forced = choice == "required" or isinstance(choice, NamedToolChoice)
        if isinstance(choice, AllowedToolsChoice):
            forced = choice.allowed_tools.mode == "required"
        json_format = self.response_format is not None and self.response_format.type != "text"
        if forced and json_format:
            raise fault("asks for JSON while 'tool_choice' demands a tool call; both cannot hold", "response_format")
        if self.grammar is not None and (forced or json_format):
            other = "tool_choice" if forced else "response_format"
            raise fault(f"and {other!r} both dictate the answer; give one of the two", "grammar")
        return self


class FunctionCall(ResponseModel):
    name: str
    arguments: str


class MessageToolCall(ResponseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AnswerMessage(ResponseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[MessageToolCall] | None = None

    null_sent = frozenset({"content", "refusal"})


class Choice(ResponseModel):
    index: int
    message: AnswerMessage
    logprobs: Logprobs | None = None
    finish_reason: FinishReason

    null_sent = frozenset({"logprobs"})


class ChatCompletion(ResponseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str | None = None
    service_tier: Literal["default"] = "default"
    x_guard: GuardReport | None = Field(default=None, description="Extension. What the guard found in the messages.")

    null_sent = frozenset({"system_fingerprint"})


class FunctionDelta(ResponseModel):
    """The name comes in the first fragment, with empty arguments; further ones carry arguments alone."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(ResponseModel):
    """The first fragment of a call has id, type and the name; the others only index and arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(ResponseModel):
    """What is new. Only fields that are given are sent, null included: the first delta of an answer is
    `Delta(role="assistant", content="", refusal=None)`, the last is `Delta()`."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(ResponseModel):
    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None

    null_sent = frozenset({"logprobs", "finish_reason"})


class ChatCompletionChunk(ResponseModel):
    """One event of a stream. With `include_usage`, give `usage=None` in every chunk but the last; otherwise leave it
    out, as OpenAI does. `x_guard` comes with each finish_reason."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None
    service_tier: Literal["default"] = "default"
    x_guard: GuardReport | None = None

    null_sent = frozenset({"system_fingerprint"})


_TEXT = secrets.token_hex(16)  # stands for the text; no id or model name can hold it by chance


class ContentChunks:
    """Chunks with nothing but text, which most are, as JSON: the part around the text is serialised only once.

    Equal byte for byte to `ChatCompletionChunk(..., delta=Delta(content=text)).to_json()`, at a tenth of the cost.
    """

    def __init__(self, chunk: ChatCompletionChunk, index: int = 0) -> None:
        """`chunk` gives id, created, model and usage; its choices do not matter. `index` is the answer's."""
        choices = [ChunkChoice(index=index, delta=Delta(content=_TEXT))]
        self._before, self._after = chunk.model_copy(update={"choices": choices}).to_json().split(f'"{_TEXT}"'.encode())

    def encode(self, text: str) -> bytes:
        """The chunk that carries `text`."""
        return self._before + to_json(text) + self._after
