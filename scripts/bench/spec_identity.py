"""Greedy texts with drafting beside those without: where they fork, and whether rounding alone explains it.

Kernels round differently at different batch widths, so that two nearly equal logits may change places. An answer that
differs is therefore read again, one token a batch, in a context of this script's own: each of its tokens must be the
best, or fall short of the best by no more than logits differ by between widths. A text can be spelt in several tokens;
of nearly equal ones that both fit, those are looked for with which all of the text is explained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.client import Answer
from bench.spec_runs import Results
from bench.spec_tasks import Task
from edgellm.backend.batch import Batch
from edgellm.backend.context import Context, ContextParams
from edgellm.chat.template import ChatTemplate
from edgellm.config import load_settings
from edgellm.engine.loaded import load_runner
from edgellm.models.describe import describe

Floats = npt.NDArray[np.float32]
Top = tuple[list[int], Floats]  # two tokens and their logits, (2,)
_WIDTHS = (2, 3, 4, 6, 8, 12, 17)  # the widths that answers are read at for comparison, in turn
_PROMPT_ROWS, _OTHER_PROMPT_ROWS = 512, 8  # what a prompt's end is read with goes with what the server has in its cache
_NEAR = 2.0  # logits this near to the best one may have changed places with it
_SPELLINGS = 12  # most that are tried of an answer
_CUT = "\ufffd"  # what is left of a character that an answer's end has cut


@dataclass(frozen=True)
class Step:
    """A token of an answer: where its bytes begin, and by how much its logit falls short of the best."""

    start: int
    token: int
    gap: float
    others: tuple[int, ...] = ()  # that fit as well, and are nearly as good


@dataclass(frozen=True)
class Reading:
    """An answer read again."""

    steps: tuple[Step, ...]
    noise: float  # most that a logit that matters differs by with other widths of answer and prompt
    step_noise: float = 0.0  # the same with those of the answer alone

    @property
    def worst(self) -> float:
        """The largest gap."""
        return max((step.gap for step in self.steps), default=0.0)


@dataclass(frozen=True)
class Fork:
    """Two greedy answers to the same request that differ."""

    workload: str
    side: str
    task: int
    position: int  # in characters
    without: str  # what follows there
    drafted: str
    plain: Reading
    reading: Reading  # of the drafted answer

    @property
    def gap(self) -> float:
        """Between the two tokens that the answers chose behind the same ones. 0 if they part in the text alone."""
        pairs = zip(self.plain.steps, self.reading.steps, strict=False)
        return next((max(a.gap, b.gap) for a, b in pairs if a.token != b.token), 0.0)


def first_difference(one: str, other: str) -> int | None:
    """Index of the first character that differs; the shorter length if one begins with the other; None if equal."""
    if one == other:
        return None
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def fitting(logits: Floats, rest: bytes, piece: Callable[[int], bytes]) -> list[int]:
    """The best token that `rest` begins with, and those near the very best; none if no token fits."""
    best = float(logits.max())
    near = np.flatnonzero(logits >= best - _NEAR)
    found = [token for token in near[np.argsort(-logits[near])].tolist() if _fits(piece(token), rest)]
    if found:  # nearly always, and sorting a vocabulary takes a while
        return found
    return [token for token in np.argsort(-logits, kind="stable").tolist() if _fits(piece(token), rest)][:1]


def _fits(piece: bytes, rest: bytes) -> bool:
    return bool(piece) and rest.startswith(piece)


def _unexplained_step(steps: Sequence[Step]) -> int:
    """The first whose token is far from the best; their number if there is none."""
    return next((index for index, step in enumerate(steps) if step.gap > _NEAR), len(steps))


def _unexplained_byte(steps: Sequence[Step], answer: Answer) -> int:
    """Where that token begins; behind the end if there is none."""
    at = _unexplained_step(steps)
    return steps[at].start if at < len(steps) else len(answer.text.encode()) + 1


class Reader:
    """Reads answers with the weights as the server has them."""

    def __init__(self, model: Path, context_tokens: int, threads: int) -> None:
        self._runner = load_runner(info := describe(model), load_settings(parallel=1, threads=threads))
        self._vocab = vocab = self._runner.model.vocab
        bos, eos = vocab.special_piece(vocab.bos), vocab.special_piece(vocab.eos)
        self._template = ChatTemplate(info.chat_template, bos_token=bos, eos_token=eos)
        params = ContextParams(context_tokens, sequences=1, batch_tokens=512, outputs=max(_WIDTHS), threads=threads)
        self._context = Context(self._runner.model, params)
        self._batch = Batch(512)

    def close(self) -> None:
        """Frees the model and ends the template's process."""
        self._context.close()
        self._template.close()
        self._runner.close()

    @property
    def end_tokens(self) -> list[int]:
        """That end an answer."""
        return sorted(self._vocab.end_tokens)

    def prompt_text(self, task: Task) -> str:
        """The prompt as the server renders it."""
        return self._template.render_sync(list(task.messages))

    def prompt(self, task: Task) -> list[int]:
        """Token ids of the prompt."""
        text, vocab = self.prompt_text(task), self._vocab
        add = not (vocab.adds_bos and text.startswith(vocab.special_piece(vocab.bos)))
        return vocab.tokenize(text, add_special=add, parse_special=True)

    def read(self, task: Task, answer: Answer) -> Reading:
        """Each token of the answer, and its end if it ended by itself."""
        prompt = self.prompt(task)
        steps, tops = self._spelt(prompt, answer)
        tokens = [step.token for step in steps]
        noises = [self._noise(prompt, tokens, tops, rows) for rows in (_OTHER_PROMPT_ROWS, _PROMPT_ROWS)]
        return Reading(tuple(steps), max(noises), noises[1])

    def _spelt(self, prompt: list[int], answer: Answer) -> tuple[list[Step], list[Top]]:
        """Of the best tokens first; then with another one before the first that cannot be explained, nearest first."""
        forced: dict[int, int] = {}
        best = self._walk(prompt, answer, forced)
        tried: set[tuple[int, int]] = set()
        for _ in range(_SPELLINGS):
            steps, far = best[0], _unexplained_step(best[0])
            options = [(at, token) for at in range(min(far, len(steps) - 1), -1, -1) for token in steps[at].others]
            choice = next((option for option in options if option not in tried), None)
            if far == len(steps) or choice is None:
                break
            tried.add(choice)
            kept = {at: token for at, token in forced.items() if at < choice[0]} | dict([choice])
            found = self._walk(prompt, answer, kept)
            if _unexplained_byte(found[0], answer) > _unexplained_byte(steps, answer):
                best, forced = found, kept
        return best

    def _walk(self, prompt: list[int], answer: Answer, forced: dict[int, int]) -> tuple[list[Step], list[Top]]:
        """The steps; and for each, which two logits were the highest, and these. `forced`: tokens by step."""
        rest = answer.text.removesuffix(_CUT).encode()
        total = len(rest)
        steps: list[Step] = []
        tops: list[Top] = []
        logits = self._first(prompt, _PROMPT_ROWS)
        while rest or answer.finish_reason == "stop":
            best = int(logits.argmax())
            silent = not self._vocab.piece(best) and not self._vocab.is_end(best)  # a control token shows no text
            tokens = [best] if silent else self._fitting(logits, rest)
            if not tokens:
                break
            token = forced.get(len(steps), tokens[0])
            others = tuple(one for one in tokens if one != token)
            steps.append(Step(total - len(rest), token, float(logits[best] - logits[token]), others))
            two = np.argpartition(-logits, 2)[:2].tolist()
            tops.append((two, logits[two].copy()))
            if self._vocab.is_end(token) or len(steps) >= 2 * answer.completion_tokens + 8:
                break
            rest = rest[len(self._vocab.piece(token)) :]
            logits = self._rows([token], len(prompt) + len(steps) - 1)[0]
        return steps, tops

    def _fitting(self, logits: Floats, rest: bytes) -> list[int]:
        if not rest:
            return [max(self._vocab.end_tokens, key=lambda token: float(logits[token]))]
        return fitting(logits, rest, self._vocab.piece)

    def _noise(self, prompt: list[int], tokens: list[int], tops: list[Top], prompt_rows: int) -> float:
        """The same tokens in wider batches, behind the prompt in batches of `prompt_rows`."""
        most, at = 0.0, 1
        rows = [self._first(prompt, prompt_rows)]
        while len(rows) < len(tops):
            width = _WIDTHS[at % len(_WIDTHS)]
            some = tokens[len(rows) - 1 : min(len(rows) - 1 + width, len(tops) - 1)]
            rows += [row.copy() for row in self._rows(some, len(prompt) + len(rows) - 1)]
            at += 1
        for row, (two, values) in zip(rows, tops, strict=False):
            most = max(most, float(np.abs(row[two] - values).max()))
        return most

    def _first(self, prompt: list[int], rows: int) -> Floats:
        """The logits behind the prompt, in an emptied context."""
        self._context.clear()
        for start in range(0, len(prompt), rows):
            found = self._rows(prompt[start : start + rows], start, outputs=1)[-1].copy()
        return found

    def _rows(self, tokens: Sequence[int], position: int, outputs: int | None = None) -> list[Floats]:
        count = len(tokens) if outputs is None else outputs
        self._batch.clear()
        self._batch.extend(tokens, position, 0, outputs=count)
        self._context.decode(self._batch)
        return [self._context.logits(row) for row in range(len(tokens) - count, len(tokens))]


def forks(
    results: Results, plans: Sequence[dict[tuple[str, int], list[Task]]], bases: dict[str, str], reader: Reader
) -> list[Fork]:
    """All forks of greedy answers, of the cells with one client. `bases`: drafting side -> the side without."""
    found = []
    for (workload, clients), sides in results.items():
        for side, base in bases.items():
            for number, (cell, plain) in enumerate(zip(sides.get(side, []), sides.get(base, []), strict=False)):
                tasks = plans[number][(workload, clients)]
                for index, (task, one, other) in enumerate(zip(tasks, plain.answers, cell.answers, strict=True)):
                    at = first_difference(one.text, other.text)
                    if clients == 1 and task.temperature is None and at is not None:
                        found.append(_fork(reader, workload, side, number * len(tasks) + index, task, one, other, at))
    return found


def _fork(
    reader: Reader, workload: str, side: str, number: int, task: Task, one: Answer, other: Answer, at: int
) -> Fork:
    shown = one.text[at : at + 24], other.text[at : at + 24]
    return Fork(workload, side, number, at, *shown, reader.read(task, one), reader.read(task, other))


def noise_limit(found: Sequence[Fork]) -> float:
    """Gaps up to this are explained by rounding: the best and the chosen logit may each be off by the noise."""
    return 2 * max((max(fork.plain.noise, fork.reading.noise) for fork in found), default=0.0)


def unexplained(found: Sequence[Fork]) -> list[Fork]:
    """Forks whose answers hold a token that rounding does not explain: bugs."""
    limit = noise_limit(found)
    return [fork for fork in found if fork.reading.worst > limit]
