"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, aclosing

from fastapi import APIRouter, Request
from starlette.responses import Response

from edgellm.backend.vocab import Vocab
from edgellm.chat.tool_calls import ContentDelta, ToolCallArguments, ToolCallEvent, ToolCallStart
from edgellm.engine.types import TokenLogprob
from edgellm.engine.types import Usage as EngineUsage
from serving.chat_prompt import prepare_chat
from serving.generation import Generation, Piece
from serving.guard_turns import chat_turns, is_short, without_refused
from serving.routes.logprobs import chat_logprobs
from serving.screening import Screen, screening
from serving.service import Leased, Service
from serving.streaming import Event, run_until_disconnect, sse_response
from serving.wire.chat import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Choice,
    ChunkChoice,
    ContentChunks,
    Delta,
    FinishReason,
    FunctionCall,
    FunctionDelta,
    MessageToolCall,
    ToolCallDelta,
)
from serving.wire.common import Usage
from serving.wire.guard import GuardReport

router = APIRouter()
_Steps = AsyncGenerator[tuple[Piece, list[ToolCallEvent], FinishReason | None]]


class _ChatAnswer:
    """Reads one answer's pieces: content apart from tool calls."""

    def __init__(self, run: _ChatRun) -> None:
        self._parser = run.job.parser()
        self.calls = 0

    def read(self, piece: Piece) -> list[ToolCallEvent]:
        """What the piece adds to the answer."""
        if self._parser is None:
            return [ContentDelta(piece.text)] if piece.text else []
        events = self._parser.feed(piece.text) if piece.text else []
        if piece.finish is not None:
            events += self._parser.finish()
        self.calls = self._parser.calls
        return events

    @property
    def complete(self) -> bool:
        """The one call that was wanted is there."""
        return self._parser is not None and self._parser.done

    def finish_reason(self, piece: Piece) -> FinishReason:
        """OpenAI's reason: calls that are complete outrank the stop that ended them."""
        if self.calls and piece.finish != "length":
            return "tool_calls"
        return "length" if piece.finish == "length" else "stop"


class _ChatRun:
    """One chat request on its way through the server."""

    def __init__(self, service: Service, request: ChatCompletionRequest) -> None:
        self.service = service
        if service.settings.guard == "refuse":
            request = request.model_copy(update={"messages": without_refused(request.messages)})
        self.request = request
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.arrived_s = time.perf_counter()
        self.model = request.model or service.models.default
        self.usages: list[EngineUsage] = []
        self.x_guard: GuardReport | None = None

    async def steps(self) -> _Steps:
        """Pieces, what each adds, and the reason in an answer's last one."""
        request = self.request
        turns = chat_turns(request.messages)
        with screening(self.service.guarding) as (screen,):
            if is_short(turns):
                screen.begin(turns)
            async with self.service.lease(request.model, request.timeout, self.arrived_s) as leased:
                async with self._in_time():
                    self.job = await prepare_chat(self.service, leased, request)
                screen.begin(turns)
                self.vocab: Vocab = leased.loaded.vocab
                generation = await self._admitted(screen, leased)
                steps = self._refusals(screen.refusal) if generation is None else self._generated(generation)
                async with aclosing(steps):
                    async for piece, events, reason in steps:
                        if reason is not None and self.x_guard is None:
                            async with self._in_time():
                                self.x_guard = await screen.report()
                        yield piece, events, reason

    async def _admitted(self, screen: Screen, leased: Leased) -> Generation | None:
        """The engine reads the prompt while the guard judges it. None: the guard refuses."""
        if screen.has_refused:
            return None
        generation = Generation(
            self.service,
            leased,
            [self.job.request],
            self.request.stops,
            timeout_s=self.request.timeout,
            arrived_s=self.arrived_s,
        )
        try:
            async with self._in_time():
                refused = await screen.refuses()
        except BaseException:
            generation.close()
            raise
        if refused:
            generation.close()
        return None if refused else generation

    async def _generated(self, generation: Generation) -> _Steps:
        """The model's answers."""
        answers = [_ChatAnswer(self) for _ in range(self.request.n)]
        async with aclosing(generation.pieces()) as pieces:
            async for piece in pieces:
                answer = answers[piece.index]
                events = answer.read(piece)
                reason = answer.finish_reason(piece) if piece.finish is not None else None
                if piece.usage is not None:
                    self.usages.append(piece.usage)
                elif answer.complete:
                    self.usages.append(generation.stop_answer(piece))
                    reason = "tool_calls"
                yield piece, events, reason

    async def _refusals(self, text: str) -> _Steps:
        """What is said instead."""
        self.usages.append(EngineUsage(len(self.job.request.prompt), 0))
        for index in range(self.request.n):
            yield Piece(0, index, text), [ContentDelta(text)], "content_filter"

    def _in_time(self) -> AbstractAsyncContextManager[None]:
        return self.service.in_time(self.request.timeout, self.arrived_s)

    async def whole(self) -> ChatCompletion:
        """The answer in one piece."""
        count = self.request.n
        texts: list[list[str]] = [[] for _ in range(count)]
        calls: list[list[MessageToolCall]] = [[] for _ in range(count)]
        logprobs: list[list[TokenLogprob]] = [[] for _ in range(count)]
        reasons: list[FinishReason] = ["stop"] * count
        async with aclosing(self.steps()) as steps:
            async for piece, events, reason in steps:
                logprobs[piece.index] += piece.logprobs
                for event in events:
                    _collect(event, texts[piece.index], calls[piece.index])
                if reason is not None:
                    reasons[piece.index] = reason
        choices = []
        for index in range(count):
            text = "".join(texts[index])
            message = AnswerMessage(content=text if text or not calls[index] else None)
            if calls[index]:
                message.tool_calls = calls[index]
            choice = Choice(index=index, message=message, finish_reason=reasons[index])
            if self.request.logprobs and reasons[index] != "content_filter":
                choice.logprobs = chat_logprobs(self.vocab, logprobs[index])
            choices.append(choice)
        body = ChatCompletion(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=Usage.total(*self.usages)
        )
        if self.x_guard is not None:
            body.x_guard = self.x_guard
        return body

    def _chunk(self, *choices: ChunkChoice) -> ChatCompletionChunk:
        chunk = ChatCompletionChunk(id=self.id, created=self.created, model=self.model, choices=list(choices))
        if self.request.include_usage:
            chunk.usage = None  # sent as null in all chunks but the last
        return chunk

    async def events(self) -> AsyncGenerator[Event]:
        """The answer in chunks."""
        started = [False] * self.request.n
        content = [ContentChunks(self._chunk(), index) for index in range(self.request.n)]
        async with aclosing(self.steps()) as steps:
            async for piece, events, reason in steps:
                index = piece.index
                if not started[index]:
                    started[index] = True
                    first = Delta(role="assistant", content="", refusal=None)
                    yield self._chunk(ChunkChoice(index=index, delta=first))
                if piece.logprobs:
                    yield self._with_logprobs(piece, events)
                else:
                    for event in events:
                        if isinstance(event, ContentDelta):
                            yield content[index].encode(event.text)
                        else:
                            yield self._chunk(ChunkChoice(index=index, delta=_delta([event])))
                if reason is not None:
                    end = self._chunk(ChunkChoice(index=index, delta=Delta(), finish_reason=reason))
                    if self.x_guard is not None:
                        end.x_guard = self.x_guard
                    yield end
        if self.request.include_usage:
            last = self._chunk()
            last.usage = Usage.total(*self.usages)
            yield last

    def _with_logprobs(self, piece: Piece, events: list[ToolCallEvent]) -> ChatCompletionChunk:
        choice = ChunkChoice(index=piece.index, delta=_delta(events))
        choice.logprobs = chat_logprobs(self.vocab, piece.logprobs)
        return self._chunk(choice)


def _collect(event: ToolCallEvent, texts: list[str], calls: list[MessageToolCall]) -> None:
    match event:
        case ContentDelta(text):
            texts.append(text)
        case ToolCallStart(_, id, name):
            calls.append(MessageToolCall(id=id, function=FunctionCall(name=name, arguments="")))
        case ToolCallArguments(index, fragment):
            calls[index].function.arguments += fragment


def _delta(events: list[ToolCallEvent]) -> Delta:
    delta = Delta()
    text = "".join(event.text for event in events if isinstance(event, ContentDelta))
    if text or not events:
        delta.content = text
    calls: list[ToolCallDelta] = []
    for event in events:
        match event:
            case ToolCallStart(index, id, name):
                function = FunctionDelta(name=name, arguments="")
                calls.append(ToolCallDelta(index=index, id=id, type="function", function=function))
            case ToolCallArguments(index, fragment):
                calls.append(ToolCallDelta(index=index, function=FunctionDelta(arguments=fragment)))
    if calls:
        delta.tool_calls = calls
    return delta


@router.post("/v1/chat/completions", response_model=ChatCompletion, summary="Answer a conversation")
async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
    """Streams `chat.completion.chunk` events with `stream: true`, otherwise answers in one piece."""
    run = _ChatRun(http.app.state.service, body)
    if body.stream:
        return sse_response(run.events())
    answer = await run_until_disconnect(http, run.whole())
    return Response(answer.to_json(), media_type="application/json")
