"""What becomes of a prompt by its verdict: the policy, and its place in answering a request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence

from edgellm.config import GuardMode, GuardOnError
from guards import Turn
from serving.guard_metrics import Action
from serving.guarding import Guarding, Judged, let_go
from serving.refusals import refusal
from serving.wire.guard import GuardReport


def is_refused(guard: GuardMode, on_error: GuardOnError, judged: Judged) -> bool:
    """Whether a prompt is not to be answered, by the settings `guard` and `guard_on_error`."""
    if guard != "refuse":
        return False
    return on_error == "closed" if judged is None else judged.unsafe


class Screen:
    """Stands before the answers to one prompt."""

    def __init__(self, guarding: Guarding) -> None:
        self._guarding = guarding
        self._settings = guarding.settings
        self._result: asyncio.Future[Judged] | None = None
        self._counted = False

    def begin(self, turns: Sequence[Turn]) -> None:
        """Lets the turns be judged; nothing with the guard off, or the second time."""
        if self._result is None and self._settings.guard != "off":
            self._result = self._guarding.judge(turns)

    async def refuses(self) -> bool:
        """Whether the prompt must not be answered. Waits for the verdict, but only where it may be a refusal."""
        if self._result is None or self._settings.guard != "refuse":
            return False
        return self._refused(await self._result)

    @property
    def has_refused(self) -> bool:
        """The same, without waiting: False as long as there is no verdict."""
        return self._result is not None and self._result.done() and self._refused(self._result.result())

    @property
    def refusal(self) -> str:
        """What is said instead of an answer. For a prompt that it has refused."""
        return refusal(self._result.result() if self._result is not None else None)

    async def report(self) -> GuardReport | None:
        """What an answer says in `x_guard`. None: nothing. For the end of an answer: it waits for the verdict."""
        if self._result is None or (self._settings.guard == "refuse" and not self.has_refused):
            return None
        judged = await self._result
        if self._settings.guard == "annotate":
            self._count(judged, refused=False)
        return GuardReport.of(judged, self._settings.guard_level)

    def drop(self) -> None:
        """The request is over: what is still being judged is not needed any more."""
        if self._result is not None:
            let_go(self._result)

    def _refused(self, judged: Judged) -> bool:
        refused = is_refused(self._settings.guard, self._settings.guard_on_error, judged)
        self._count(judged, refused=refused)
        return refused

    def _count(self, judged: Judged, *, refused: bool) -> None:
        if judged is not None and not self._counted:
            self._counted = True
            passed: Action = "annotated" if self._settings.guard == "annotate" else "answered"
            self._guarding.metrics.count(judged, "refused" if refused else passed)


@contextlib.contextmanager
def screening(guarding: Guarding, prompts: int = 1) -> Iterator[list[Screen]]:
    """A screen for each prompt of a request; on leaving, all are dropped."""
    screens = [Screen(guarding) for _ in range(prompts)]
    try:
        yield screens
    finally:
        for screen in screens:
            screen.drop()
