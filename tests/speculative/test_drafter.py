"""The drafter model: after whatever was accepted or not, it goes on from the very text of the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from edgellm.backend.batch import Batch
from edgellm.backend.context import Context, ContextParams
from edgellm.backend.model import Model
from edgellm.speculative.bridge import Bridge
from edgellm.speculative.costs import StepCosts
from edgellm.speculative.drafter import CELLS, SEQUENCES, Drafter
from edgellm.speculative.ngram_cache import NgramCache
from edgellm.speculative.proposer import Prompt, Want
from tests.support.tiny_gguf import write_tiny_llama
from tests.support.vocabularies import vocabulary

TARGETS = ("bytes", "spaced", "smol", "qwen", "gemma")
TEXT = "The user said hello to the world, and the name of it is null. Is it true or false?\n" * 3


def _context(model: Model, cells: int, sequences: int) -> Context:
    params = ContextParams(
        context_tokens=cells, sequences=sequences, batch_tokens=512, outputs=4, threads=1, flash_attention="off"
    )
    return Context(model, params)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("drafter") / "small.gguf", context=4096)


@pytest.fixture
def drafter(small: Path, request: pytest.FixtureRequest) -> Iterator[Drafter]:
    target = vocabulary(request.param)
    model = Model(small)
    made = Drafter(
        model,
        _context(model, SEQUENCES * CELLS, SEQUENCES),
        Bridge(model.vocab, target, NgramCache()),
        StepCosts({1: 1.0}),
    )
    yield made
    made.close()


def _greedy(model: Model, tokens: Sequence[int], count: int) -> list[int]:
    """The reference: reads everything anew, and takes the likeliest token each time."""
    context, batch = _context(model, 2048, 1), Batch(1)
    drawn: list[int] = []
    for position in range(len(tokens) + count - 1):
        batch.clear()
        batch.extend([tokens[position] if position < len(tokens) else drawn[-1]], position, 0, outputs=1)
        context.decode(batch)
        if position >= len(tokens) - 1:
            drawn.append(int(context.logits(0).argmax()))
            if model.vocab.is_end(drawn[-1]):
                break
    context.close()
    return drawn


@pytest.mark.parametrize("drafter", TARGETS, indirect=True)
def test_it_goes_on_from_the_text_of_the_answer(drafter: Drafter) -> None:
    target = drafter.bridge.target.vocab
    random = np.random.default_rng(0)
    whole = target.tokenize(TEXT, add_special=False, parse_special=False)
    context = list(whole[:20])
    state = drafter.begin(Prompt(context, 0.0))
    text = [token for token in range(min(target.n_tokens, 5000)) if target.piece(token)]
    compared = 0
    for turn in range(25):
        (guess,) = drafter.propose([Want(state, context, 5)])
        tokens = guess.tokens if guess is not None else ()
        assert len(tokens) <= 5
        held = state.transcript.held
        reference = _greedy(drafter.model, state.transcript.tokens, 12)
        said = b"".join(drafter.model.vocab.piece(token) for token in reference)
        assert not tokens or said.startswith(held + b"".join(target.piece(token) for token in tokens))
        compared += len(tokens)
        # What the target draws: some of the guess, then a token of the text, or any at all.
        kept = list(tokens[: random.integers(0, len(tokens) + 1)])
        other = whole[(20 + turn) % len(whole)] if turn % 3 else int(random.choice(text))
        context += [*kept, other]
        drafter.extend(state, [*kept, other])
    assert compared > 10
    drafter.end(state, context)


@pytest.mark.parametrize("drafter", ["smol"], indirect=True)
def test_answers_draft_together_as_they_do_alone(drafter: Drafter) -> None:
    target = drafter.bridge.target.vocab
    texts = ["hello world, you", "the name is", "true and false and", "null to the user"]
    contexts = [target.tokenize(text, add_special=False, parse_special=False) for text in texts]
    alone = []
    for context in contexts:
        state = drafter.begin(Prompt(context, 0.0))
        alone += drafter.propose([Want(state, context, 4)])
        drafter.end(state, context)
    states = [drafter.begin(Prompt(context, 0.0)) for context in contexts]
    together = drafter.propose([Want(state, context, 4) for state, context in zip(states, contexts, strict=True)])
    assert [g and g.tokens for g in together] == [g and g.tokens for g in alone]


@pytest.mark.parametrize("drafter", ["smol"], indirect=True)
def test_more_answers_than_sequences_take_turns(drafter: Drafter) -> None:
    target = drafter.bridge.target.vocab
    contexts = [target.tokenize(f"{word} world", add_special=False, parse_special=False) for word in "abcdefg"]
    states = [drafter.begin(Prompt(context, 0.0)) for context in contexts]
    first = [drafter.propose([Want(state, context, 3)])[0] for state, context in zip(states, contexts, strict=True)]
    again = [drafter.propose([Want(state, context, 3)])[0] for state, context in zip(states, contexts, strict=True)]
    assert [g and g.tokens for g in first] == [g and g.tokens for g in again]
    assert sum(state.sequence >= 0 for state in states) == SEQUENCES
    everything = drafter.propose([Want(state, context, 3) for state, context in zip(states, contexts, strict=True)])
    assert all(guess is None for guess in everything[SEQUENCES:])
    for state, context in zip(states, contexts, strict=True):
        drafter.end(state, context)
    assert all(drafter.context.last_position(sequence) == -1 for sequence in range(SEQUENCES))


@pytest.mark.parametrize("drafter", ["smol"], indirect=True)
def test_an_answer_longer_than_its_cells_goes_on(drafter: Drafter) -> None:
    target = drafter.bridge.target.vocab
    context = target.tokenize(TEXT * 8, add_special=False, parse_special=False)
    state = drafter.begin(Prompt(context, 0.0))
    for _ in range(CELLS // 16):
        drafter.propose([Want(state, context, 4)])
        assert len(state.transcript.tokens) < CELLS
        more = target.tokenize(TEXT, add_special=False, parse_special=False)[:30]
        context = [*context, *more]
        drafter.extend(state, more)


@pytest.mark.parametrize("drafter", ["smol"], indirect=True)
def test_it_stops_where_more_is_not_worth_it(drafter: Drafter) -> None:
    target = drafter.bridge.target.vocab
    context = target.tokenize("hello world", add_special=False, parse_special=False)
    state = drafter.begin(Prompt(context, 0.0))
    (long,) = drafter.propose([Want(state, context, 8, 0.0)])
    drafter.extend(state, [])
    (short,) = drafter.propose([Want(state, context, 8, 0.99)])
    assert long is not None
    assert len(short.tokens if short is not None else ()) < len(long.tokens)


@pytest.mark.parametrize("drafter", ["bytes"], indirect=True)
def test_before_there_is_a_whole_character_nothing_is_drafted(drafter: Drafter) -> None:
    target = drafter.bridge.target.vocab
    first = next(token for token in range(target.n_tokens) if target.piece(token) == b"\xf0")
    state = drafter.begin(Prompt([first], 0.0))
    assert drafter.propose([Want(state, [first], 4)]) == [None]
