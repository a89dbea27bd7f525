"""What scripts/bench_adapt measures: a drafter along a stream of answers, adapted as a server would adapt it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.client import BenchError
from bench.spec_tasks import read_rows as read_text
from edgellm.backend.model import VocabFile
from edgellm.speculative.bridge import EVERY_WAY, Way
from edgellm.speculative.buffer import AnswerBuffer, Record
from edgellm.speculative.drafter import Drafter, load_drafter
from edgellm.speculative.ngram_cache import vocabulary_fingerprint
from edgellm.speculative.places import merged_path
from edgellm.speculative.replay import Replay, replay
from edgellm.tune.adaptation_spec import AdaptationSpec
from edgellm.tune.draft.answers import answer, encode_messages, write_rows
from edgellm.tune.draft.samples import Row, read_rows

DRAFTED = 4
"""Tokens of a draft."""

WAYS = {"direct": Way.DIRECT, "text": Way.DIRECT | Way.TEXT, "n-gram": EVERY_WAY}
"""How drafted tokens become the target's, of a drafter that is not adapted."""

_CODE = "Complete this Python function. Answer with the whole function in a code block.\n\n```python\n"
_CHUNK = 4  # answers that the drafter follows at a time


@dataclass(frozen=True, slots=True)
class Models:
    """GGUF files."""

    target: Path
    drafter: Path
    threads: int


@dataclass(frozen=True, slots=True)
class Followed:
    """One answer of the stream."""

    kind: str
    adapters: int  # that had been taken before
    found: Replay


def questions(text: Path, kind: str, rows: slice) -> list[Row]:
    """Requests without answers. Raises BenchError."""
    if kind == "gsm8k":
        prompts = [row["question"] for row in read_text(text / "gsm8k-train-3000.jsonl.gz")]
    elif kind == "humaneval":
        prompts = [f"{_CODE}{row['prompt']}```" for row in read_text(text / "HumanEval.jsonl.gz")]
    else:
        raise BenchError(f"{kind}: neither gsm8k nor humaneval")
    found = prompts[rows]
    if len(found) < rows.stop - rows.start:
        raise BenchError(f"{kind} has {len(prompts)} prompts")
    return [Row(messages=[{"role": "user", "content": prompt}], kind=kind) for prompt in found]


def answered(rows: Sequence[Row], models: Models, most_tokens: int, path: Path) -> list[tuple[str, Record]]:
    """The target's greedy answers to `rows`; kept in `path`, and read from there if it is there."""
    vocab = VocabFile(models.target)
    try:
        if not path.is_file():
            encode_messages(rows, vocab.vocab, models.target)
            answer(
                rows,
                models.target,
                most_tokens=most_tokens,
                threads=models.threads,
                report=lambda done, whole: print(f"answers {done}/{whole}", file=sys.stderr, flush=True),
                stopped=lambda: False,
            )
            write_rows(path, rows)
    finally:
        vocab.close()
    kept = kept_answers(path, models.target)
    if len(kept) != len(rows):
        raise BenchError(f"{path} holds {len(kept)} answers of another run: give another --work")
    return kept


def kept_answers(path: Path, target: Path) -> list[tuple[str, Record]]:
    """Answers with their kind, from a file that `answered` has written."""
    vocab = VocabFile(target)
    try:
        rows = read_rows(path, vocab.vocab.n_tokens)
    finally:
        vocab.close()
    return [(row.kind, Record(tuple(row.prompt), tuple(row.answer))) for row in rows]


@contextmanager
def drafting(models: Models, ways: Way = EVERY_WAY, learnt: Sequence[Record] = ()) -> Iterator[Drafter]:
    """The drafter; its n-gram cache has seen `learnt`."""
    with ExitStack() as stack:
        target = stack.enter_context(closing(VocabFile(models.target)))
        drafter = load_drafter(models.drafter, target.vocab, threads=models.threads, ways=ways)
        stack.callback(drafter.close)
        for record in learnt:
            drafter.bridge.learn(record.answer)
        yield drafter


def measure(drafter: Drafter, records: Sequence[Record]) -> Replay:
    """Along all of them."""
    return sum(replay(drafter, records, most=DRAFTED, together=_CHUNK), Replay())


class Stream:
    """Answers in the order in which they were given. Whenever `every` more have come, the drafter is adapted, as if
    there had been time just then; what it has learned is used from the next answer on."""

    def __init__(self, models: Models, spec: AdaptationSpec, every: int) -> None:
        """`spec` says how; its paths are used."""
        self._models, self._spec, self._every = models, spec, every
        self.taken: dict[int, Path] = {}  # adapters, by the answers before them
        self.rounds: list[dict[str, Any]] = []  # results of adaptations, and after how many answers

    def follow(self, answers: Sequence[tuple[str, Record]]) -> Iterator[Followed]:
        """Raises BenchError when an adaptation fails."""
        with closing(VocabFile(self._models.target)) as target:
            buffer = AnswerBuffer(self._spec.buffer, vocabulary_fingerprint(target.vocab))
        models = self._models
        for start in range(0, len(answers), self._every):
            part = answers[start : start + self._every]
            with drafting(models) as drafter:
                for kind, record in part:
                    yield Followed(kind, len(self.taken), measure(drafter, [record]))
                    buffer.append(record.prompt, record.answer)
            number = start + len(part)
            if number < len(answers) and self._adapt(number):
                models = replace(models, drafter=merged_path(self.taken[number]))

    def _adapt(self, number: int) -> bool:
        """Whether the new adapter was taken."""
        output = self._spec.output.with_name(f"adapter-{number}.gguf")
        spec = replace(self._spec, output=output, earlier=next(reversed(self.taken.values()), None))
        command = [sys.executable, "-m", "edgellm.tune.adaptation", *spec.options()]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        last = json.loads(done.stdout.splitlines()[-1])
        if done.returncode or last["event"] != "done":
            raise BenchError(f"the adaptation failed: {last.get('message')}")
        self.rounds.append({"answers": number, **last})
        print(f"after {number} answers: {last}", file=sys.stderr, flush=True)
        if last["accepted"]:
            self.taken[number] = output
        return bool(last["accepted"])
