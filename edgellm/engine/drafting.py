"""Between the runner's answers and the speculator: whose tokens are drafted in a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgellm.engine.plan import Share
from edgellm.engine.sequence import Answer
from edgellm.speculative.proposer import Prompt
from edgellm.speculative.speculator import DRAFT_TOKENS, Draftable, Line, Speculator


class Drafting:
    """Of one runner."""

    def __init__(self, speculator: Speculator) -> None:
        self.speculator = speculator

    def add(self, shares: Sequence[Share], room: int) -> list[Share]:
        """`shares` with drafts for answers that are generating, at most `room` tokens together."""
        drafted = list(shares)
        wanted: list[Draftable] = []
        places: list[int] = []
        for place, share in enumerate(shares):
            answer = share.answer
            if answer.generated and share.count == 1:
                left = answer.job.request.max_tokens - answer.generated - 1
                wanted.append(Draftable(self._line(answer), answer.tokens, min(DRAFT_TOKENS, left), left))
                places.append(place)
        if not wanted:
            return drafted
        rows = sum(share.count for share in shares)
        for place, draft in zip(places, self.speculator.draft(wanted, rows=rows, room=max(0, room)), strict=True):
            if draft:
                drafted[place] = replace(shares[place], draft=draft)
        return drafted

    def ended(self, answer: Answer) -> None:
        """The answer is over, however it ended."""
        if answer.line is not None:
            self.speculator.end(answer.line, answer.tokens)
            answer.line = None

    def _line(self, answer: Answer) -> Line:
        job = answer.job
        if answer.line is None:
            if job.draft_prompt is None:
                request = job.request
                job.draft_prompt = Prompt(request.prompt, request.sampling.temperature, request.prediction)
            answer.line = self.speculator.begin(job.draft_prompt)
        return answer.line
