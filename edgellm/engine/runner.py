"""One model at work: admits answers, runs steps, draws tokens, reports events. All on the engine thread.

A step is one `llama_decode` over prompt chunks, next tokens and drafted tokens of the running answers that share an
adapter set. Drafted tokens are accepted while they equal what the answer's own sampler draws, which leaves the
distribution of the output untouched whatever proposed them.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from edgellm.backend.batch import Batch
from edgellm.backend.context import Context
from edgellm.backend.model import Adapter, Model
from edgellm.backend.sampler import Sampler
from edgellm.engine.attached import AttachedAdapters
from edgellm.engine.cache import PrefixCache
from edgellm.engine.drafting import Drafting
from edgellm.engine.logprobs import token_logprob
from edgellm.engine.plan import RunnerLimits, Share, choose_adapters, plan_step
from edgellm.engine.sequence import Answer, Job
from edgellm.engine.types import ErrorEvent, EventSink, FinishEvent, FinishReason, GenerateRequest, TokenEvent
from edgellm.errors import AdapterNotFoundError, BackendError, EdgeLLMError, GrammarError, ModelUnsupportedError
from edgellm.moe.pager import Pager
from edgellm.speculative.speculator import END, Speculator

_log = logging.getLogger(__name__)

_ADMIT_MARGIN_CELLS = 32  # room that every running answer should have left when another one is let in


@dataclass(slots=True)
class RunnerStats:
    """Counters since the model was loaded. Seconds are wall time."""

    steps: int = 0
    step_seconds: float = 0.0
    decode_seconds: float = 0.0
    prompt_tokens: int = 0  # computed, not counting what the prefix cache gave
    generated_tokens: int = 0
    preemptions: int = 0
    failures: int = 0


class Runner:
    """The scheduler and executor of one context."""

    def __init__(
        self,
        model: Model,
        context: Context,
        limits: RunnerLimits,
        cache: PrefixCache,
        *,
        speculator: Speculator | None = None,
        pager: Pager | None = None,
    ) -> None:
        self.model = model
        self.context = context
        self.limits = limits
        self.cache = cache
        self.stats = RunnerStats()
        self.speculator = speculator if model.can_roll_back else None
        self._drafting = Drafting(self.speculator) if self.speculator is not None else None
        self.pager = pager
        self._batch = Batch(limits.batch_tokens)
        self._waiting: deque[Answer] = deque()
        self._running: list[Answer] = []  # in order of arrival
        self._steady: list[Share] | None = None  # the plan of every step until the running answers change
        self._attached = AttachedAdapters(context)
        self._touched: list[Job] = []
        self._number = 0

    # --- requests -------------------------------------------------------------------------------------------------

    def submit(self, request: GenerateRequest, sink: EventSink) -> Job:
        """Queues a request. A request that cannot start is answered with an ErrorEvent."""
        self._number += 1
        job = Job(request, sink, self._number)
        try:
            if self.model.has_encoder or not self.context.has_memory:
                raise ModelUnsupportedError("This model makes embeddings; it does not generate text")
            self._attached.check(request.adapters)
            sampling = request.sampling_with(self.model.vocab.end_tokens)
            for index in range(request.n):
                sampler = Sampler(self.model.vocab, sampling, index=index, prompt=request.penalised_tokens)
                leader = job.answers[0] if index else None
                job.answers.append(Answer(job, index, sampler, list(request.prompt), leader=leader))
        except EdgeLLMError as error:
            self._fail_job(job, error)
            self._deliver()
            return job
        self._waiting.extend(job.answers)
        return job

    def cancel(self, job: Job, index: int | None = None) -> None:
        """Takes a job, or one of its answers, out before the next step. The sink hears no more of it."""
        job.cancelled = job.cancelled or index is None
        for answer in job.answers:
            if not answer.finished and index in (None, answer.index):
                self._leave(answer)

    @property
    def adapters(self) -> Collection[str]:
        """Names of the adapters at hand."""
        return self._attached.by_name.keys()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._running or self._waiting)

    @property
    def running(self) -> int:
        """Answers that hold a sequence."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Answers that wait for room."""
        return len(self._waiting)

    # --- adapters -------------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Makes an adapter available under `name`, in place of an earlier one of that name."""
        self.remove_adapter(name)
        self._attached.add(name, adapter)

    def remove_adapter(self, name: str) -> None:
        """Withdraws an adapter; requests that use it end with an error. Unknown names are ignored."""
        if name not in self._attached.by_name:
            return
        error = AdapterNotFoundError(f"The adapter '{name}' was unloaded")
        for job in {a.job for a in (*self._running, *self._waiting)}:
            if any(use.name == name for use in job.request.adapters):
                self._fail_job(job, error)
        self._deliver()
        self.cache.drop_adapter(name)
        self._attached.remove(name)

    # --- the step -------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Admits what fits, computes one batch, draws tokens, delivers events."""
        started = time.perf_counter()
        self._admit()
        shares = self._plan()
        if shares:
            try:
                self._compute(shares)
                self._collect(shares)
            except BackendError as error:
                self._fail_shares(shares, error)
        self._deliver()
        if not self.has_work:
            self.cache.settle()
        self.stats.steps += 1
        self.stats.step_seconds += time.perf_counter() - started

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.limits.parallel:
            # Followers of a leader that reads their prompt are forked from it; meanwhile they let others pass.
            answer = next((a for a in self._waiting if a.leader is None or a.leader not in self._running), None)
            if answer is None or not self._may_enter(answer):
                return
            answer.leader = None
            self._waiting.remove(answer)
            entry = self.cache.acquire(answer.tokens, answer.job.request.adapters)
            answer.entry = entry
            if not answer.generated:
                answer.cached_tokens = len(entry.tokens)
            self._enter(answer)

    def _may_enter(self, answer: Answer) -> bool:
        """Whether there is room for all its tokens, beside some growth of those that run. Alone, it always may."""
        if not self._running:
            return True
        margin = _ADMIT_MARGIN_CELLS * (len(self._running) + 1)
        pending = sum(other.pending for other in self._running)
        ledger = self.cache.ledger
        needed = len(answer.tokens) + margin + pending
        return needed <= ledger.free or needed <= ledger.free + self.cache.evictable

    def _enter(self, answer: Answer) -> None:
        self._steady = None
        self._running.append(answer)
        self._running.sort(key=lambda a: (a.job.number, a.index))

    def _plan(self) -> list[Share]:
        if self._steady is not None and self.cache.reserve(len(self._steady)):
            return self._with_drafts(self._steady, len(self._steady))
        while self._running:
            adapters = choose_adapters(self._running, self._attached.active)
            shares = plan_step(
                self._running,
                adapters,
                batch_tokens=self.limits.batch_tokens,
                prompt_chunk_tokens=self.limits.prompt_chunk_tokens,
            )
            needed = sum(share.rows for share in shares)
            if self.cache.reserve(needed):
                # Each answer decodes, one token at a time: so it goes on until one ends or another one comes.
                decoding = needed == len(shares) == len(self._running) and all(share.completes for share in shares)
                self._steady = shares if decoding else None
                return self._with_drafts(shares, needed)
            self._make_room()
        return []

    def _with_drafts(self, shares: list[Share], rows: int) -> list[Share]:
        """Drafts take what is left over of the step and of the cells: nothing makes way for a guess."""
        if self._drafting is None:
            return shares
        room = min(self.limits.draft_rows, self.limits.batch_tokens - rows, self.cache.ledger.free - rows)
        return self._drafting.add(shares, room)

    def _make_room(self) -> None:
        """Preempts the youngest answer; it resumes from its own tokens later. The last one left has filled the cache
        by itself and ends."""
        youngest = self._running[-1]
        if len(self._running) == 1:
            self._finish(youngest, FinishReason.LENGTH)
            return
        self._running.pop()
        self._steady = None
        if youngest.entry is not None:
            self.cache.discard(youngest.entry)
            youngest.entry = None
        self._waiting.appendleft(youngest)
        self.stats.preemptions += 1

    def _compute(self, shares: Sequence[Share]) -> None:
        self._attached.activate(shares[0].answer.job.request.adapters)
        batch = self._batch
        batch.clear()
        for share in shares:
            answer, entry = share.answer, share.answer.entry
            if entry is None:
                raise BackendError("an answer without a sequence was planned")
            start = len(entry.tokens)
            tokens = [*answer.tokens[start : start + share.count], *share.draft]
            outputs = 1 + len(share.draft) if share.completes else 0
            self.cache.append(entry, tokens)
            batch.extend(tokens, start, entry.sequence, outputs=outputs)
            if share.count > 1:
                self.stats.prompt_tokens += share.count
        started = time.perf_counter()
        self.context.decode(batch)
        seconds = time.perf_counter() - started
        self.stats.decode_seconds += seconds
        if self.pager is not None:
            self.pager.after_step(seconds, batch.n_tokens)
        if self.speculator is not None:
            self.speculator.observe(batch.n_tokens, seconds)

    def _collect(self, shares: Sequence[Share]) -> None:
        row = 0
        for share in shares:
            row += share.rows
            answer = share.answer
            if answer.finished or not share.completes:
                continue  # its job failed just now; or the prompt goes on in the next step
            reads_prompt = not answer.generated
            self._draw(share, row - 1 - len(share.draft))
            if reads_prompt and not answer.index:
                self._fork_followers(answer, row - 1)

    def _draw(self, share: Share, row: int) -> None:
        """Draws from the row of the last pending token, then from those of the drafts for as long as they match."""
        answer, draft = share.answer, share.draft
        length, line = len(answer.tokens), answer.line
        answer.rejected_drafts += len(draft)  # until they are accepted
        for offset in range(len(draft) + 1):
            drafted = draft[offset] if offset < len(draft) else None
            token = self._draw_one(answer, row + offset, drafted)
            if token is None or token != drafted:
                break
        if self.speculator is not None and line is not None:
            end = (END,) if answer.reason is FinishReason.STOP else ()
            self.speculator.judge(line, (*answer.tokens[length:], *end))
        if draft and answer.entry is not None:
            kept = len(answer.tokens) - length  # drawn tokens; the last is not in the cache yet
            self.cache.truncate(answer.entry, length + max(kept - 1, 0))

    def _draw_one(self, answer: Answer, row: int, drafted: int | None = None) -> int | None:
        """Draws and reports one token, where `drafted` was guessed. None when the answer is over."""
        request = answer.job.request
        sampler = answer.sampler
        try:
            token = sampler.sample(self.context, row)
        except GrammarError as error:
            self._fail_job(answer.job, error)
            return None
        ended = token is None or (
            token in request.stop_tokens or (not request.ignore_eos and self.model.vocab.is_end(token))
        )
        if token is None or ended:
            self._finish(answer, FinishReason.STOP)
            return None
        logprob = None
        if request.top_logprobs is not None:
            logprob = token_logprob(self.context.logits(row), token, request.top_logprobs)
        answer.tokens.append(token)
        answer.generated += 1
        self.stats.generated_tokens += 1
        if token == drafted:
            answer.accepted_drafts += 1
            answer.rejected_drafts -= 1
        drafts = answer.accepted_drafts, answer.rejected_drafts
        self._report(answer.job, TokenEvent(answer.index, token, logprob, answer.cached_tokens, *drafts))
        if answer.generated >= request.max_tokens or len(answer.tokens) >= self.context.context_tokens:
            self._finish(answer, FinishReason.LENGTH)
            return None
        return token

    def _fork_followers(self, leader: Answer, row: int) -> None:
        """The other answers to the same prompt start from the same logits, sharing the prompt's cells."""
        for answer in leader.job.answers[1:]:
            if answer.leader is not leader or answer not in self._waiting:
                continue
            answer.leader = None
            if leader.entry is None or not self.model.can_roll_back or len(self._running) >= self.limits.parallel:
                continue  # enters by the queue, and finds the prompt in the prefix cache
            self._waiting.remove(answer)
            entry = self.cache.fork(leader.entry)
            answer.entry = entry
            answer.cached_tokens = len(entry.tokens)
            self._enter(answer)
            self._draw_one(answer, row)

    # --- endings --------------------------------------------------------------------------------------------------

    def _finish(self, answer: Answer, reason: FinishReason) -> None:
        answer.reason = reason
        self._leave(answer)
        self._report(answer.job, FinishEvent(answer.index, reason, answer.usage))

    def _leave(self, answer: Answer) -> None:
        answer.finished = True
        answer.sampler.close()
        if self._drafting is not None:
            self._drafting.ended(answer)
        if answer in self._running:
            self._running.remove(answer)
            self._steady = None
        elif answer in self._waiting:
            self._waiting.remove(answer)
        if answer.entry is not None:
            self.cache.retire(answer.entry)
            answer.entry = None

    def _fail_shares(self, shares: Sequence[Share], error: BackendError) -> None:
        """A step failed: what it touched is unknown, so its requests end with the error and their cells are freed."""
        _log.error("step failed: %s", error)
        self.stats.failures += 1
        for share in shares:
            if share.answer.entry is not None:
                self.cache.discard(share.answer.entry)
                share.answer.entry = None
        for job in dict.fromkeys(share.answer.job for share in shares):
            if job.unfinished:
                self._fail_job(job, error)

    def _fail_job(self, job: Job, error: EdgeLLMError) -> None:
        for answer in job.answers:
            if not answer.finished:
                self._leave(answer)
        self._report(job, ErrorEvent(error))

    def _report(self, job: Job, event: TokenEvent | FinishEvent | ErrorEvent) -> None:
        if not job.events:
            self._touched.append(job)
        job.events.append(event)

    def _deliver(self) -> None:
        touched, self._touched = self._touched, []
        for job in touched:
            events, job.events = job.events, []
            if not job.cancelled:
                job.sink(events)

    def fail_all(self, error: EdgeLLMError) -> None:
        """Ends every request with `error`. Nothing they computed is kept: after a failure it cannot be trusted."""
        for answer in self._running:
            if answer.entry is not None:
                self.cache.discard(answer.entry)
                answer.entry = None
        for job in dict.fromkeys(answer.job for answer in (*self._running, *self._waiting)):
            self._fail_job(job, error)
        self._deliver()

    def close(self) -> None:
        """Frees the context, the adapters and the model."""
        self._attached.close()
        self.context.close()
        if self.pager is not None:
            self.pager.save()
        if self.speculator is not None:
            self.speculator.close()
        self.model.close()
