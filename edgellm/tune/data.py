"""A training file read, checked and turned into token sequences.

Files are UTF-8, one JSON object a line (edgellm/tune/examples.py has the formats); empty lines do not count. All faults
are told with their lines, the first 100 of them. Nothing is set aside for validation: that is what a validation file
is for.

An example longer than the training length is cut there, as OpenAI does, and learns to that point; if no answer is left
of it, it is left out. A preference with an output that is too long is left out as a whole, for half an answer is
neither preferred nor not. Both are told in notices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgellm.errors import TrainingDataError
from edgellm.tune.coding import Coder, TrainingSequence, encode
from edgellm.tune.examples import Conversation, Example, Method, Preference, parse_example
from edgellm.tune.faults import FAULTS_MAX, ExampleError, Faults, Notice

EXAMPLES_MIN = 10
FILE_BYTES_MAX = 512 << 20
LINE_BYTES_MAX = 8 << 20  # parsed, a line takes many times its size


@dataclass(frozen=True, slots=True, eq=False)
class TrainingPair:
    """Two answers to one prompt."""

    preferred: TrainingSequence
    rejected: TrainingSequence


@dataclass(frozen=True, slots=True)
class Told:
    """What was done with examples that could not be used as they are."""

    notices: tuple[Notice, ...]  # the first 100
    cut: int
    left_out: int
    rewritten: int  # examples with answers that are not learnt, for the template rewrites them


@dataclass(frozen=True, slots=True, eq=False)
class TrainingSet:
    """A file's sequences in the order of its lines: `sequences` of a supervised one, `pairs` of a dpo one."""

    sequences: tuple[TrainingSequence, ...]
    pairs: tuple[TrainingPair, ...]
    told: Told


def check_file(path: Path, method: Method, *, least: int = EXAMPLES_MIN, param: str = "training_file") -> int:
    """The number of examples, once all are sound; needs no model. Raises TrainingDataError, of `param`."""
    return sum(1 for _ in _examples(path, method, Faults(), least, param))


def load_file(
    path: Path,
    method: Method,
    coder: Coder,
    row_tokens: int,
    *,
    least: int = EXAMPLES_MIN,
    param: str = "training_file",
) -> TrainingSet:
    """The sequences of a file, each of at most `row_tokens` tokens. Raises TrainingDataError, of `param`.

    Takes about 5 bytes a token and 500 an example.
    """
    building = _Building(coder, row_tokens)
    faults = Faults()
    for line, example in _examples(path, method, faults, least, param):
        try:
            building.add(line, example)
        except ExampleError as error:
            faults.add(line, str(error))
    faults.check(param)
    if not building.sequences and not building.pairs:
        text = f"no example has an answer within the training length of {row_tokens} tokens"
        raise TrainingDataError([(0, text)], param)
    return building.result()


def _examples(path: Path, method: Method, faults: Faults, least: int, param: str) -> Iterator[tuple[int, Example]]:
    """(line, example) for each sound line. At the end raises TrainingDataError if there were faults."""
    count = 0
    for line, data in _lines(path, faults, param):
        count += 1
        try:
            example = parse_example(data, method)
        except ExampleError as error:
            faults.add(line, str(error))
            continue
        if not faults.full:
            yield line, example
    if count < least and not faults.full:
        faults.add(0, f"the file has {count} example{'' if count == 1 else 's'}, but at least {least} are needed")
    faults.check(param)


def _lines(path: Path, faults: Faults, param: str) -> Iterator[tuple[int, bytes]]:
    """(number, line) for each line that is not empty, until `faults` is full."""
    try:
        with path.open("rb") as file:
            if path.stat().st_size > FILE_BYTES_MAX:
                raise TrainingDataError([(0, f"the file is larger than {FILE_BYTES_MAX >> 20} MiB")], param)
            number = 0
            while not faults.full and (line := file.readline(LINE_BYTES_MAX + 1)):
                number += 1
                if len(line) > LINE_BYTES_MAX:
                    faults.add(number, f"is longer than {LINE_BYTES_MAX >> 20} MiB")
                    while line and not line.endswith(b"\n"):
                        line = file.readline(LINE_BYTES_MAX)
                    continue
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line
    except OSError as error:
        raise TrainingDataError([(0, f"the file cannot be read: {error.strerror or error}")], param) from None


class _Building:
    """Collects what `load_file` returns."""

    def __init__(self, coder: Coder, row_tokens: int) -> None:
        self.sequences: list[TrainingSequence] = []
        self.pairs: list[TrainingPair] = []
        self._coder = coder
        self._row_tokens = row_tokens
        self._notices: list[Notice] = []
        self._cut = self._left_out = self._rewritten = 0

    def add(self, line: int, example: Example) -> None:
        """Raises ExampleError."""
        match example:
            case Conversation():
                self._add_conversation(line, encode(example, self._coder))
            case Preference(preferred, rejected):
                self._add_pair(line, encode(preferred, self._coder), encode(rejected, self._coder))

    def result(self) -> TrainingSet:
        told = Told(tuple(self._notices), self._cut, self._left_out, self._rewritten)
        return TrainingSet(tuple(self.sequences), tuple(self.pairs), told)

    def _add_conversation(self, line: int, sequence: TrainingSequence) -> None:
        if sequence.untrained:
            self._rewritten += 1
            count = sequence.untrained
            self._tell(line, f"answers not learnt: {count}; the model's chat template rewrites them when others follow")
        size, most = len(sequence.tokens), self._row_tokens
        if size > most:
            sequence = sequence.cut(most)
            if not sequence.trained_tokens:
                self._left_out += 1
                self._tell(line, f"left out: of its {size} tokens the first {most} hold no answer")
                return
            self._cut += 1
            self._tell(line, f"cut from {size} to {most} tokens")
        self.sequences.append(sequence)

    def _add_pair(self, line: int, preferred: TrainingSequence, rejected: TrainingSequence) -> None:
        size = max(len(preferred.tokens), len(rejected.tokens))
        if size > self._row_tokens:
            self._left_out += 1
            self._tell(line, f"left out: its {size} tokens are more than {self._row_tokens}")
        else:
            self.pairs.append(TrainingPair(preferred, rejected))

    def _tell(self, line: int, message: str) -> None:
        if len(self._notices) < FAULTS_MAX:
            self._notices.append(Notice(line, message))
