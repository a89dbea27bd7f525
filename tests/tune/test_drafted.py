"""What a drafter is to learn of an answer: where two tokenisations meet, and what is wanted there. Real tokenizers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from edgellm.speculative.bridge import Bridge  # noqa: E402
from edgellm.speculative.buffer import Record  # noqa: E402
from edgellm.speculative.transcript import Transcript  # noqa: E402
from edgellm.tune.drafted import NGRAM_WEIGHT, DraftedAnswer, direct_tokens, drafted, runs_of, together  # noqa: E402
from edgellm.tune.teacher import Likeliest  # noqa: E402
from tests.speculative.test_bridge import bridge, pairs  # noqa: E402
from tests.support.texts import PASSAGES, texts  # noqa: E402

SMOL_QWEN = ("smol", "qwen")


def spelled(its: Bridge, text: str) -> tuple[int, ...]:
    return tuple(its.target.spell_most(text.encode()))


def sure(record: Record) -> Likeliest:
    """A target that was sure of each token."""
    return np.array(record.answer, np.int32)[:, None], np.ones((len(record.answer), 1), np.float32)


def learn(its: Bridge, record: Record, likeliest: Likeliest | None = None, most_tokens: int = 9999) -> DraftedAnswer:
    found = drafted(its, record, likeliest or sure(record), direct_tokens(its), most_tokens=most_tokens)
    assert found is not None
    return found


@pairs
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_runs_are_all_places_where_the_tokens_meet(pair: tuple[str, str], data: st.DataObject) -> None:
    its = bridge(pair)
    some = st.integers(0, its.target.vocab.n_tokens - 1).filter(lambda token: its.target.pieces[token] != b"")
    parts = st.one_of(some.map(lambda token: (token,)), texts.map(lambda text: spelled(its, text)))
    prompt, answer = (tuple(itertools.chain.from_iterable(data.draw(st.lists(parts, max_size=3)))) for _ in range(2))
    record = Record(prompt, answer)
    transcript = Transcript(its, [*prompt, *answer])
    tokens, begins = list(transcript.tokens), int(its.drafter.vocab.adds_bos)
    whole = its.target.text([*prompt, *answer])
    if its.drafter.text(tokens) + transcript.held != whole:  # the drafter's vocabulary lacks some bytes
        return
    runs = runs_of(its, record, tokens, transcript.held)
    for run in runs:
        assert its.drafter.text(tokens[run.start : run.end]) == its.target.pieces[run.token]
        assert record.answer[run.place] == run.token
    edges = {len(its.drafter.text(tokens[:count])) for count in range(begins, len(tokens) + 1)}
    meeting = [
        place
        for place in range(len(answer))
        if {len(its.target.text([*prompt, *answer[:place]])), len(its.target.text([*prompt, *answer[: place + 1]]))}
        <= edges
    ]
    assert [run.place for run in runs] == meeting


@pairs
@pytest.mark.parametrize("passage", PASSAGES)
def test_whole_answers(pair: tuple[str, str], passage: str) -> None:
    its = bridge(pair)
    record = Record(spelled(its, "hello world "), spelled(its, passage))
    found, sizes = learn(its, record), its.drafter.pieces
    assert (found.places > 0).all()
    assert (np.diff(found.places) > 0).all()
    assert set(found.weights.tolist()) <= {1.0, float(np.float32(NGRAM_WEIGHT))}
    direct = found.weights == 1
    for place in found.places[direct]:
        piece = sizes[found.tokens[place]]
        assert its.target.find(piece) == its.direct[found.tokens[place]]
    # a target that is sure wants just what stands there
    assert np.array_equal(found.wanted, found.tokens[found.places])
    assert np.array_equal(found.rows, np.arange(len(found.places)))
    assert (found.probabilities == 1).all()


def test_what_is_spelled_with_several_tokens_is_their_likelihood() -> None:
    its = bridge(SMOL_QWEN)
    for word in (" Beispielsätze", " std::unordered_map", '("', " 数学", " прив"):
        for token in spelled(its, word):
            run = its.drafter.spell(its.target.pieces[token])
            if run is None or len(run) < 2:
                continue
            found = learn(its, Record(spelled(its, "x =\n"), (token,)))
            if len(found.places) != len(run):
                continue  # it is spelled otherwise behind the prompt
            assert found.weights.tolist() == pytest.approx([NGRAM_WEIGHT] * len(run))
            assert found.tokens[found.places].tolist() == run
            return
    pytest.fail("no token was spelled with several")


def test_half_characters_are_learnt_where_both_have_them_alone() -> None:
    its = bridge(SMOL_QWEN)
    answer = spelled(its, "so 🦙𓀀 it is")
    assert any(not _is_text(its.target.pieces[token]) for token in answer)
    for cut in range(1, len(answer) + 1):
        record = Record(spelled(its, "and"), answer[:cut])
        transcript = Transcript(its, [*record.prompt, *record.answer])
        runs = runs_of(its, record, list(transcript.tokens), transcript.held)
        assert all(run.end <= len(transcript.tokens) for run in runs)
        if transcript.held:  # of the last token a part is not there yet
            assert all(run.place < cut - 1 for run in runs)


def test_control_tokens_are_those_of_the_same_name() -> None:
    its = bridge(SMOL_QWEN)
    begin, end = (
        its.target.vocab.tokenize(text, add_special=False, parse_special=True)[0]
        for text in ("<|im_start|>", "<|im_end|>")
    )
    record = Record((begin, *spelled(its, "user\nhello"), end), (*spelled(its, "hello there."), end))
    found = learn(its, record)
    mine = its.control_to_drafter(end)
    assert mine >= 0
    assert found.tokens[0] == its.control_to_drafter(begin)
    assert found.tokens[found.places[-1]] == mine
    assert (found.wanted[-1], found.weights[-1]) == (mine, 1.0)


def test_the_targets_probabilities_are_those_of_drafter_tokens() -> None:
    its = bridge(SMOL_QWEN)
    record = Record(spelled(its, "one two"), spelled(its, " three"))
    back = direct_tokens(its)
    others = [token for token in map(its.target.find, (b" four", b" five")) if token in back]
    alien = next(token for token, piece in enumerate(its.target.pieces) if piece and token not in back)
    tokens = np.array([[record.answer[0], others[0], alien, others[1]]], np.int32)
    found = learn(its, record, (tokens, np.array([[0.5, 0.25, 0.125, 0.0625]], np.float32)))
    assert found.weights.tolist() == [1.0]
    assert dict(zip(found.wanted.tolist(), found.probabilities.tolist(), strict=True)) == {
        back[record.answer[0]]: 0.5,
        back[others[0]]: 0.25,
        back[others[1]]: 0.0625,
    }


@pairs
def test_direct_tokens_are_the_tokenizers_own(pair: tuple[str, str]) -> None:
    its = bridge(pair)
    for target, token in direct_tokens(its).items():
        assert its.direct[token] == target
        piece = its.drafter.pieces[token]
        assert not piece or its.drafter.find(piece) == token


def test_long_ones_are_cut_behind_a_whole_token() -> None:
    its = bridge(SMOL_QWEN)
    record = Record(spelled(its, PASSAGES[0]), spelled(its, PASSAGES[1]))
    whole = learn(its, record)
    cut = learn(its, record, most_tokens=int(whole.places[-1]) - 5)
    count = len(cut.places)
    assert len(cut.tokens) == int(whole.places[-1]) - 5
    assert cut.places.max() < len(cut.tokens)
    assert np.array_equal(cut.places, whole.places[:count])
    nothing = drafted(its, record, sure(record), direct_tokens(its), most_tokens=3)
    assert nothing is None


def test_a_pack_wants_the_same_of_each_answer() -> None:
    its = bridge(SMOL_QWEN)
    records = [Record(spelled(its, "You are a helpful assistant. "), spelled(its, text)) for text in PASSAGES[:3]]
    answers = [learn(its, record) for record in records]
    packed, rows, targets = together(answers)
    assert targets.written.tolist() == [int(one.tokens[place]) for one in answers for place in one.places]
    assert torch.equal(targets.tokens, targets.written[targets.rows])
    before = [int(one.tokens[place - 1]) for one in answers for place in one.places]
    assert packed.tokens[rows].tolist() == before
    assert (targets.rows.diff() >= 0).all()


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True
