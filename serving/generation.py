"""From the engine's token events to pieces of text: what chat and text completions have in common."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from edgellm.chat.text import TextAssembler
from edgellm.engine.loaded import LoadedModel
from edgellm.engine.stream import EventStream
from edgellm.engine.types import ErrorEvent, FinishEvent, FinishReason, GenerateRequest, TokenEvent, TokenLogprob, Usage
from edgellm.errors import RequestError
from serving.metrics import ModelMetrics
from serving.service import Leased, Service


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of one answer. `finish` is set in the last piece of an answer, with its `usage`."""

    number: int  # of the request among those generated together
    index: int  # of the answer among the request's n
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens whose text is in this piece
    finish: FinishReason | None = None
    usage: Usage | None = None


class _Answer:
    """Text assembly of one answer, and the log-probabilities of tokens whose text is held back."""

    def __init__(self, stops: tuple[str, ...], loaded: LoadedModel, prompt_tokens: int) -> None:
        self.text = TextAssembler(stops, loaded.vocab.piece)
        self.held: deque[TokenLogprob] = deque()
        self.released = 0
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        self.accepted_drafts = 0
        self.rejected_drafts = 0
        self.last_token_s = 0.0
        self.finished = False

    def feed(self, event: TokenEvent) -> tuple[str, tuple[TokenLogprob, ...]]:
        self.cached_tokens = event.cached_tokens
        self.accepted_drafts, self.rejected_drafts = event.accepted_drafts, event.rejected_drafts
        text = self.text.feed(event.token)
        if event.logprob is None:
            return text, ()
        self.held.append(event.logprob)
        return text, self._release()

    def finish(self) -> tuple[str, tuple[TokenLogprob, ...]]:
        return self.text.finish(), self._release()

    @property
    def usage(self) -> Usage:
        """Of an answer that is ended here, before the engine ends it."""
        drafts = self.accepted_drafts, self.rejected_drafts
        return Usage(self.prompt_tokens, self.text.tokens_fed, self.cached_tokens, *drafts)

    def _release(self) -> tuple[TokenLogprob, ...]:
        count = self.text.tokens_released - self.released
        self.released += count
        return tuple(self.held.popleft() for _ in range(min(count, len(self.held))))


class Generation:
    """Runs requests of one model together; iterate it for their pieces. Close it in the end.

    `stop_answer` ends one answer early, when what it was wanted for is there; `drop` all answers to a request.
    """

    def __init__(
        self,
        service: Service,
        leased: Leased,
        requests: Sequence[GenerateRequest],
        stops: tuple[str, ...],
        *,
        timeout_s: float | None,
        arrived_s: float,
    ) -> None:
        """`arrived_s` is when the HTTP request came (time.perf_counter), for the time to first token."""
        self._metrics: ModelMetrics = service.metrics.for_model(leased.loaded.name)
        self._arrived_s = arrived_s
        self._stream = EventStream(service.bridge(), timeout_s=service.limit_s(timeout_s), since_s=arrived_s)
        self._answers = {
            (number, index): _Answer(stops, leased.loaded, len(request.prompt))
            for number, request in enumerate(requests)
            for index in range(request.n)
        }
        self._open = len(self._answers)
        for request in requests:
            self._stream.submit(leased.loaded.runner, request)
        leased.arrival.over()

    async def pieces(self) -> AsyncGenerator[Piece]:
        """Every piece until all answers are complete. Raises what the engine reports."""
        try:
            while self._open:
                for number, event, drawn_s in await self._stream.next():
                    if isinstance(event, ErrorEvent):
                        raise event.error
                    answer = self._answers[number, event.index]
                    if answer.finished:
                        continue
                    piece = self._piece(number, answer, event, drawn_s)
                    if piece.finish is not None:
                        self._end(answer)
                    if piece.text or piece.finish or piece.logprobs:
                        yield piece
        finally:
            self.close()
            self._metrics.observe_request_s(time.perf_counter() - self._arrived_s)

    def stop_answer(self, piece: Piece) -> Usage:
        """Ends the answer that `piece` belongs to; no more of it will come. Returns its token counts."""
        answer = self._answers[piece.number, piece.index]
        self._end(answer)
        self._stream.cancel(piece.number, piece.index)
        return self._count(answer.usage)

    def drop(self, number: int) -> None:
        """Ends every answer to request `number`; no more of them will come, and what there was is not counted."""
        for (owner, index), answer in self._answers.items():
            if owner == number and not answer.finished:
                self._end(answer)
                self._stream.cancel(number, index)

    def close(self) -> None:
        """Cancels what still runs. Idempotent."""
        self._stream.close()

    def _end(self, answer: _Answer) -> None:
        answer.finished = True
        self._open -= 1

    def _piece(self, number: int, answer: _Answer, event: TokenEvent | FinishEvent, drawn_s: float) -> Piece:
        if isinstance(event, FinishEvent):
            text, logprobs = answer.finish()
            return Piece(number, event.index, text, logprobs, event.reason, self._count(event.usage))
        if answer.last_token_s:
            self._metrics.observe_inter_token_s(drawn_s - answer.last_token_s)
        else:
            self._metrics.observe_ttft_s(drawn_s - self._arrived_s)
        answer.last_token_s = drawn_s
        text, logprobs = answer.feed(event)
        if not answer.text.stopped:
            return Piece(number, event.index, text, logprobs)
        self._stream.cancel(number, event.index)
        usage = self._count(answer.usage)
        return Piece(number, event.index, text, logprobs, FinishReason.STOP, usage)

    def _count(self, usage: Usage) -> Usage:
        self._metrics.count_tokens(usage)
        return usage


def token_budget(limit: int | None, prompt_tokens: int, context_tokens: int, param: str) -> int:
    """Tokens that may be generated: what the request allows, or what the context leaves.

    A limit that no prompt could leave room for is refused; one that this prompt leaves no room for ends the answer at
    the context's end, with finish_reason "length".
    """
    if limit is not None and limit > context_tokens:
        raise RequestError(
            f"{param} is too large: {limit}. This model's context has {context_tokens} tokens, prompt included.", param
        )
    room = context_tokens - prompt_tokens
    return room if limit is None else min(limit, room)
