"""What scripts/bench_adapt measures: a drafter along a stream of answers, adapted as a server would adapt it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.client import BenchError
from bench.spec_tasks import read_rows as read_text
from edgellm.backend.model import Adapter, VocabFile, load_packed
from edgellm.speculative.bridge import EVERY_WAY, Bridge, Way
from edgellm.speculative.buffer import AnswerBuffer, Record
from edgellm.speculative.costs import StepCosts
from edgellm.speculative.drafter import Drafter, drafter_context
from edgellm.speculative.ngram_cache import NgramCache, vocabulary_fingerprint
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
        kept = read_rows(path, vocab.vocab.n_tokens)
    finally:
        vocab.close()
    if len(kept) != len(rows):
        raise BenchError(f"{path} holds {len(kept)} answers of another run: give another --work")
    return [(row.kind, Record(tuple(row.prompt), tuple(row.answer))) for row in kept]


@contextmanager
def drafting(models: Models, ways: Way = EVERY_WAY, learnt: Sequence[Record] = ()) -> Iterator[Drafter]:
    """The drafter; its n-gram cache has seen `learnt`."""
    target = VocabFile(models.target)
    model = load_packed(models.drafter)
    bridge = Bridge(model.vocab, target.vocab, NgramCache(), ways=ways)
    for record in learnt:
        bridge.learn(record.answer)
    drafter = Drafter(model, drafter_context(model, threads=models.threads), bridge, StepCosts(None))
    try:
        yield drafter
    finally:
        drafter.close()
        target.close()


def measure(drafter: Drafter, records: Sequence[Record]) -> Replay:
    """Along all of them."""
    return sum(replay(drafter, records, most=DRAFTED, together=_CHUNK), Replay())


class Stream:
    """Answers in the order in which they were given. Whenever `every` more have come, the drafter is adapted, as if
    there had been time just then; what it has learned is used from the next answer on."""

    def __init__(self, models: Models, spec: AdaptationSpec, every: int) -> None:
        """`spec` says how; its paths are used."""
        self._models, self._spec, self._every = models, spec, every
        self.taken: list[Path] = []
        self.rounds: list[dict[str, Any]] = []  # results of adaptations, and after how many answers

    def follow(self, answers: Sequence[tuple[str, Record]]) -> Iterator[Followed]:
        """Raises BenchError when an adaptation fails."""
        spec = self._spec
        with drafting(self._models) as drafter:
            buffer = AnswerBuffer(spec.buffer, vocabulary_fingerprint(drafter.bridge.target.vocab))
            for number, (kind, record) in enumerate(answers, 1):
                yield Followed(kind, len(self.taken), measure(drafter, [record]))
                buffer.append(record.prompt, record.answer)
                if number % self._every == 0 and number < len(answers):
                    adapter = self._adapt(number)
                    if adapter is not None:
                        drafter.set_adapter(Adapter(drafter.model, adapter))

    def _adapt(self, number: int) -> Path | None:
        """The new adapter, if it was taken."""
        output = self._spec.output.with_name(f"adapter-{number}.gguf")
        earlier = self.taken[-1] if self.taken else None
        spec = replace(self._spec, output=output, earlier=earlier)
        command = [sys.executable, "-m", "edgellm.tune.adaptation", *spec.options()]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        last = json.loads(done.stdout.splitlines()[-1])
        if done.returncode or last["event"] != "done":
            raise BenchError(f"the adaptation failed: {last.get('message')}")
        self.rounds.append({"answers": number, **last})
        print(f"after {number} answers: {last}", file=sys.stderr, flush=True)
        if not last["accepted"]:
            return None
        self.taken.append(output)
        return output
