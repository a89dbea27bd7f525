"""A drafter along known answers, and with other models in its place: tiny real ones in llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgellm.backend.model import Model
from edgellm.speculative.bridge import Bridge
from edgellm.speculative.buffer import Record
from edgellm.speculative.costs import StepCosts
from edgellm.speculative.drafter import BATCH_TOKENS, SEQUENCES, Drafter, drafter_context
from edgellm.speculative.ngram_cache import NgramCache
from edgellm.speculative.proposer import Prompt, Want
from edgellm.speculative.replay import Replay, replay
from tests.support.tiny_gguf import write_tiny_llama

PROMPT = tuple(b"hello world, the user is in the name of you and of the world; ")
Make = Callable[[Path], Drafter]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "m.gguf")


@pytest.fixture
def make() -> Iterator[Make]:
    """A drafter of the file for a target of its own vocabulary."""
    made: list[Drafter] = []

    def drafter(path: Path) -> Drafter:
        model = Model(path)
        context = drafter_context(model, threads=1, flash_attention="off")
        made.append(Drafter(model, context, Bridge(model.vocab, model.vocab, NgramCache()), StepCosts()))
        return made[-1]

    yield drafter
    for one in made:
        one.close()


def written(drafter: Drafter, count: int) -> tuple[int, ...]:
    """What the drafter writes after PROMPT, a draft at a time: tokens as their text is spelled."""
    state, found = drafter.begin(Prompt(PROMPT, 0.0)), ()
    while len(found) < count:
        drawn = guess(drafter, state, PROMPT + found)
        assert drawn
        found += drawn
        drafter.extend(state, drawn)
    drafter.end(state, found)
    return found[:count]


def guess(drafter: Drafter, state: object, context: tuple[int, ...]) -> tuple[int, ...]:
    (found,) = drafter.propose([Want(state, context, 6)])
    return () if found is None else found.tokens


def swap(drafter: Drafter, path: Path) -> None:
    model = Model(path)
    context = drafter_context(model, threads=1, flash_attention="off")
    drafter.swap(model, context, Bridge(model.vocab, drafter.bridge.target.vocab, drafter.bridge.cache))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "other.gguf", seed=7)


def test_another_model_is_used_at_once_and_no_cell_of_the_one_before(base: Path, other: Path, make: Make) -> None:
    target = make(base)  # whose vocabulary outlives the models that draft for it
    drafter, second, first = (make_for(target, path, make) for path in (base, other, base))
    states = [one.begin(Prompt(PROMPT, 0.0)) for one in (drafter, second, first)]
    theirs, plain = guess(second, states[1], PROMPT), guess(first, states[2], PROMPT)
    assert theirs != plain
    assert guess(drafter, states[0], PROMPT) == plain
    swap(drafter, other)
    drafter.extend(states[0], ())  # an answer under way goes on
    assert guess(drafter, states[0], PROMPT) == theirs
    swap(drafter, base)
    assert guess(drafter, states[0], PROMPT) == plain


def make_for(target: Drafter, path: Path, make: Make) -> Drafter:
    """A drafter of the file for the vocabulary of another's model."""
    made = make(path)
    made.bridge = Bridge(made.model.vocab, target.model.vocab, NgramCache())
    return made


def test_cells_are_read_anew(base: Path, other: Path, make: Make) -> None:
    target = make(base)
    drafter = make_for(target, base, make)
    states = [drafter.begin(Prompt(PROMPT, 0.0)) for _ in range(2)]
    drafter.propose([Want(state, PROMPT, 2) for state in states])
    swap(drafter, other)
    assert all(drafter.context.last_position(sequence) == -1 for sequence in range(SEQUENCES))
    assert all(drafter.outlook(state, PROMPT).pending == len(PROMPT) for state in states)


def test_what_the_drafter_itself_wrote_is_accepted(base: Path, other: Path, make: Make) -> None:
    target = make(base)
    drafter, plain, second = (make_for(target, path, make) for path in (base, base, other))
    records = [Record(PROMPT, written(one, 60)) for one in (plain, second)]
    assert records[0] != records[1]
    own = [sum(replay(drafter, [record], most=6), Replay()) for record in records]
    swap(drafter, other)
    its = [sum(replay(drafter, [record], most=6), Replay()) for record in records]
    assert own[0].acceptance > 0.8 > 0.5 > own[1].acceptance
    assert its[1].acceptance > 0.8 > 0.5 > its[0].acceptance
    assert own[0].tokens_per_call > 2 * own[1].tokens_per_call


def test_every_token_is_counted_once(base: Path, make: Make) -> None:
    drafter = make(base)
    records = [Record(PROMPT[:8], tuple(range(40 + number, 60 + number))) for number in range(2 * SEQUENCES + 1)]
    together = list(replay(drafter, records, most=3))
    apart = [sum(replay(drafter, [record], most=3), Replay()) for record in records]
    assert [one.tokens for one in together] == [20] * len(records)
    for one in together:
        assert one.tokens <= one.accepted + one.calls
        assert one.accepted <= one.drafted <= 3 * one.calls
    assert sum(together, Replay()) == sum(apart, Replay())


def test_no_answers(base: Path, make: Make) -> None:
    found = sum(replay(make(base), [], most=4), Replay())
    assert (found.acceptance, found.tokens_per_call) == (0.0, 0.0)


def test_long_prompts_are_read_in_parts(base: Path, make: Make) -> None:
    long = tuple(b"".join(b"%d, " % number for number in range(100)))
    prompts = [long[place:] + PROMPT for place in range(SEQUENCES)]
    apart = [guess(drafter := make(base), drafter.begin(Prompt(prompt, 0.0)), prompt) for prompt in prompts]
    drafter = make(base)
    found = drafter.propose([Want(drafter.begin(Prompt(prompt, 0.0)), prompt, 6) for prompt in prompts])
    assert [() if one is None else one.tokens for one in found] == apart
    assert sum(drafter.context.last_position(sequence) for sequence in range(SEQUENCES)) > BATCH_TOKENS
