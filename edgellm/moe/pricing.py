"""Whether reading ahead pays: measured while running, by turns with it and without.

Reading ahead helps where the disk has time to spare and the predictions are good; where the disk is what everything
waits for, each wrong guess makes a step longer. Which of the two holds depends on the machine, the model, the budget
and the text, so it is tried: some steps with, some without, in turns, and the faster way is kept for a while. The
longer a way has proved itself, the rarer the trials.
"""

from __future__ import annotations

from dataclasses import dataclass, field

BLOCK_STEPS = 6
"""Steps in a turn; the first is not counted, since it finds what the other way has left in memory."""

TURNS = 4
"""Turns of each way in a trial."""

FIRST_HOLD_STEPS = 128
LAST_HOLD_STEPS = 4096
"""Steps between trials: the first number after a decision that is new, doubled with each that confirms it."""

_GAIN = 0.03  # reading ahead must save at least this part of a step: less is within the noise of a trial
_CLEAR = 0.15  # a difference of this part ends a trial after half of its turns
_SMOOTHING = 0.05  # of a step's usual length
_MOST_ROWS = 16  # steps of more rows are prompts: they are not compared


@dataclass(slots=True)
class PrefetchPrice:
    """Feed it each step's length; `on` says whether the next one reads ahead. Time enters only as a number."""

    on: bool = True
    _trial: bool = True
    _left: int = BLOCK_STEPS  # steps of this turn, or of the hold
    _turns: int = 0  # that are over, of this trial
    _hold: int = FIRST_HOLD_STEPS
    _decided: bool | None = None
    _reads: int = 0  # in this turn
    _usual: dict[int, float] = field(default_factory=dict)  # rows -> seconds of a step
    _samples: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})

    def observe(self, seconds: float, rows: int, reads: int) -> None:
        """A step of `rows` rows took `seconds`, and needed `reads` reads, those ahead included."""
        if rows > _MOST_ROWS:
            return
        usual = self._usual.get(rows, seconds)
        self._usual[rows] = usual + _SMOOTHING * (seconds - usual)
        self._left -= 1
        self._reads += reads
        if self._trial and self._left < BLOCK_STEPS - 1:
            self._samples[self.on].append(seconds / self._usual[rows])
        if self._left > 0:
            return
        if not self._trial:
            self._begin_trial()
        elif not self._reads and not self.on:
            self._decide(False)  # everything is in memory
        else:
            self._next_turn()

    def _begin_trial(self) -> None:
        self._samples = {True: [], False: []}
        self._trial, self._turns, self._left, self._reads = True, 0, BLOCK_STEPS, 0

    def _next_turn(self) -> None:
        self._turns += 1
        gain = self._gain()
        if self._turns >= 2 * TURNS or (self._turns >= TURNS and abs(gain) > _CLEAR):
            self._decide(gain > _GAIN)
            return
        self.on = not self.on
        self._left, self._reads = BLOCK_STEPS, 0

    def _gain(self) -> float:
        """The part of a step that reading ahead saves."""
        ahead, without = (self._middle(self._samples[way]) for way in (True, False))
        return 1 - ahead / without if ahead and without else 0.0

    @staticmethod
    def _middle(samples: list[float]) -> float:
        """The mean without the largest and smallest quarter: a pause of the machine must not decide."""
        cut = len(samples) // 4
        kept = sorted(samples)[cut : len(samples) - cut]
        return sum(kept) / len(kept) if kept else 0.0

    def _decide(self, on: bool) -> None:
        same = self._decided is None or self._decided == on
        self._hold = min(2 * self._hold, LAST_HOLD_STEPS) if same and self._decided is not None else FIRST_HOLD_STEPS
        self._decided = self.on = on
        self._trial, self._left, self._reads = False, self._hold, 0
