"""POST /v1/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractAsyncContextManager, aclosing, closing
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from starlette.responses import Response

from edgellm.engine.loaded import LoadedModel
from edgellm.engine.types import FinishReason, GenerateRequest, Grammar, TokenLogprob
from edgellm.engine.types import Usage as EngineUsage
from edgellm.errors import RequestError
from serving.chat_prompt import build_request
from serving.generation import Generation, Piece, token_budget
from serving.guard_turns import prompt_turns
from serving.routes.logprobs import CompletionLogprobsBuilder
from serving.screening import Screen, screening
from serving.service import Leased, Service
from serving.streaming import Event, run_until_disconnect, sse_response
from serving.wire.common import Usage
from serving.wire.completions import Completion, CompletionChoice, CompletionRequest
from serving.wire.guard import GuardReport

router = APIRouter()


@dataclass(slots=True)
class _Answer:
    """One answer, gathered."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: str | None = None
    usage: EngineUsage | None = None

    @property
    def mean_logprob(self) -> float:
        """For best_of."""
        return sum(item.logprob for item in self.logprobs) / max(len(self.logprobs), 1)


class _CompletionRun:
    """One completion request on its way through the server."""

    def __init__(self, service: Service, request: CompletionRequest) -> None:
        if request.echo and request.logprobs is not None:
            raise RequestError("Log-probabilities of an echoed prompt are not available", "echo")
        self.service = service
        self.request = request
        self.id = f"cmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.arrived_s = time.perf_counter()
        self.model = request.model or service.models.default
        self.usages: dict[int, list[EngineUsage]] = {}
        self.texts: list[str] = []  # of the prompts
        self.refused: dict[int, int] = {}  # numbers of prompts that the guard refuses -> their tokens
        self.reports: dict[int, GuardReport] = {}  # by number of the prompt

    @property
    def _drawn(self) -> int:
        return max(self.request.n, self.request.best_of or 1)

    async def _requests(self, leased: Leased) -> list[GenerateRequest]:
        request, loaded = self.request, leased.loaded
        grammar = Grammar(request.grammar) if request.grammar is not None else None
        logprobs = request.logprobs
        if logprobs is None and self._drawn > request.n:
            logprobs = 0  # best_of compares them
        found = []
        for prompt in request.prompts:
            tokens = await self._prompt(loaded, prompt)
            budget = token_budget(request.max_tokens, len(tokens), loaded.context_tokens, "max_tokens")
            found.append(build_request(loaded, leased, request, tokens, budget, grammar, logprobs, self._drawn))
            self.texts.append(prompt if isinstance(prompt, str) else _text(loaded, tokens))
        return found

    async def _prompt(self, loaded: LoadedModel, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        limit = loaded.context_tokens - 1
        if self.request.suffix is not None:
            return await self._infill(loaded, prompt, self.request.suffix, limit)
        if isinstance(prompt, str):
            return await self.service.tokenize(loaded, prompt, limit=limit, param="prompt")
        return self.service.check_tokens(loaded, prompt, limit=limit, param="prompt")

    async def _infill(
        self, loaded: LoadedModel, prompt: str | tuple[int, ...], suffix: str, limit: int
    ) -> tuple[int, ...]:
        """Prefix, suffix, middle: the order that models which fill in the middle were trained on."""
        vocab = loaded.vocab
        if not isinstance(prompt, str):
            raise RequestError("A suffix goes with a prompt that is text", "suffix")
        if min(vocab.fim_prefix, vocab.fim_suffix, vocab.fim_middle) < 0:
            raise RequestError(f"The model '{loaded.name}' cannot fill in the middle: it takes no suffix", "suffix")
        before = await self.service.tokenize(loaded, prompt, limit=limit, param="prompt", add_special=False)
        after = await self.service.tokenize(loaded, suffix, limit=limit, param="suffix", add_special=False)
        tokens = (vocab.fim_prefix, *before, vocab.fim_suffix, *after, vocab.fim_middle)
        return self.service.check_tokens(loaded, tokens, limit=limit, param="prompt")

    async def steps(self) -> AsyncGenerator[Piece]:
        """Every piece; notes what the usage needs, and what the guard found by the time of an answer's last piece."""
        timeout_s = self.request.timeout
        with screening(self.service.guarding, len(self.request.prompts)) as screens:
            async with self.service.lease(self.request.model, timeout_s, self.arrived_s) as leased:
                self.vocab = leased.loaded.vocab
                async with self._in_time():
                    requests = await self._requests(leased)
                with closing(await self._admitted(screens, leased, requests)) as generation:
                    for piece in self._refusals(screens):
                        await self._note(screens[piece.number], piece)
                        yield piece
                    async with aclosing(generation.pieces()) as pieces:
                        async for piece in pieces:
                            await self._note(screens[piece.number], piece)
                            yield piece

    async def _admitted(self, screens: list[Screen], leased: Leased, requests: list[GenerateRequest]) -> Generation:
        """The engine reads the prompts while the guard judges them; those that it refuses are dropped."""
        for screen, text in zip(screens, self.texts, strict=True):
            screen.begin(prompt_turns(text, self.request.suffix))
        generation = Generation(
            self.service,
            leased,
            requests,
            self.request.stops,
            timeout_s=self.request.timeout,
            arrived_s=self.arrived_s,
        )
        try:
            async with self._in_time():
                for number, screen in enumerate(screens):
                    if await screen.refuses():
                        generation.drop(number)
                        self.refused[number] = len(requests[number].prompt)
        except BaseException:
            generation.close()
            raise
        return generation

    def _refusals(self, screens: list[Screen]) -> Iterator[Piece]:
        """What is said instead."""
        for number, prompt_tokens in self.refused.items():
            for index in range(self._drawn):
                yield Piece(
                    number, index, screens[number].refusal, (), FinishReason.STOP, EngineUsage(prompt_tokens, 0)
                )

    async def _note(self, screen: Screen, piece: Piece) -> None:
        if piece.usage is not None:
            self.usages.setdefault(piece.number, []).append(piece.usage)
        if piece.finish is not None and piece.number not in self.reports:
            async with self._in_time():
                report = await screen.report()
            if report is not None:
                self.reports[piece.number] = report

    def _in_time(self) -> AbstractAsyncContextManager[None]:
        return self.service.in_time(self.request.timeout, self.arrived_s)

    def usage(self) -> Usage:
        """Over all prompts and answers, those that best_of dropped included."""
        totals = [Usage.total(*usages) for usages in self.usages.values()]
        result = Usage.total()
        for total in totals:
            result = result + total
        return result

    async def whole(self) -> Completion:
        """The answers in one piece."""
        answers: dict[tuple[int, int], _Answer] = {}
        async with aclosing(self.steps()) as steps:
            async for piece in steps:
                answer = answers.setdefault((piece.number, piece.index), _Answer())
                answer.text.append(piece.text)
                answer.logprobs += piece.logprobs
                answer.reason = piece.finish or answer.reason
        choices: list[CompletionChoice] = []
        for number in range(len(self.request.prompts)):
            mine = [answers[number, index] for index in range(self._drawn)]
            if self._drawn > self.request.n:
                mine = sorted(mine, key=lambda answer: answer.mean_logprob, reverse=True)[: self.request.n]
            choices += [self._choice(answer, number, len(choices) + i) for i, answer in enumerate(mine)]
        body = Completion(id=self.id, created=self.created, model=self.model, choices=choices)
        body.usage = self.usage()
        return body

    def _choice(self, answer: _Answer, number: int, index: int) -> CompletionChoice:
        echo = self.texts[number] if self.request.echo else ""
        choice = CompletionChoice(text=echo + "".join(answer.text), index=index)
        self._end(choice, number, answer.reason)
        if self.request.logprobs is not None and number not in self.refused:
            choice.logprobs = CompletionLogprobsBuilder(self.vocab).build(answer.logprobs)
        return choice

    def _end(self, choice: CompletionChoice, number: int, reason: str | None) -> None:
        """What the last chunk of an answer to prompt `number` says, or its only one."""
        choice.finish_reason = "length" if reason == "length" else "stop"
        if number in self.refused:
            choice.finish_reason = "content_filter"
        if number in self.reports:
            choice.x_guard = self.reports[number]

    def _chunk(self, *choices: CompletionChoice) -> Completion:
        chunk = Completion(id=self.id, created=self.created, model=self.model, choices=list(choices))
        if self.request.include_usage:
            chunk.usage = None
        return chunk

    async def events(self) -> AsyncGenerator[Event]:
        """The answers in chunks."""
        request = self.request
        builders: dict[int, CompletionLogprobsBuilder] = {}
        async with aclosing(self.steps()) as steps:
            async for piece in steps:
                index = piece.number * request.n + piece.index
                first = index not in builders
                builder = builders.setdefault(index, CompletionLogprobsBuilder(self.vocab))
                if first and request.echo:
                    yield self._chunk(CompletionChoice(text=self.texts[piece.number], index=index))
                choice = CompletionChoice(text=piece.text, index=index)
                if piece.logprobs and request.logprobs is not None:
                    choice.logprobs = builder.build(piece.logprobs)
                if piece.finish is not None:
                    self._end(choice, piece.number, piece.finish)
                yield self._chunk(choice)
        if request.include_usage:
            last = self._chunk()
            last.usage = self.usage()
            yield last


def _text(loaded: LoadedModel, tokens: tuple[int, ...]) -> str:
    return b"".join(map(loaded.vocab.piece, tokens)).decode("utf-8", "replace")


@router.post("/v1/completions", response_model=Completion, summary="Continue a text")
async def completions(body: CompletionRequest, http: Request) -> Response:
    """Streams `text_completion` events with `stream: true`, otherwise answers in one piece."""
    run = _CompletionRun(http.app.state.service, body)
    if body.stream:
        return sse_response(run.events())
    answer = await run_until_disconnect(http, run.whole())
    return Response(answer.to_json(), media_type="application/json")
