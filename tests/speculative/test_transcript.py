"""One answer in drafter tokens, while the target writes it."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.speculative.bridge import Bridge
from edgellm.speculative.spelling import incomplete_bytes
from edgellm.speculative.transcript import Transcript
from tests.speculative.test_bridge import bridge, pairs
from tests.support.texts import PASSAGES, texts
from tests.support.vocabularies import vocabulary


def start(its: Bridge) -> int:
    return int(its.drafter.vocab.adds_bos)


def shown(its: Bridge, transcript: Transcript) -> bytes:
    return its.drafter.text(transcript.tokens) + transcript.held


@pairs
@pytest.mark.parametrize("passage", PASSAGES)
def test_a_text_token_by_token_is_spelled_as_the_whole(pair: tuple[str, str], passage: str) -> None:
    its = bridge(pair)
    transcript, text = Transcript(its), b""
    for token in its.target.spell(passage.encode()) or []:
        before = list(transcript.tokens)
        same = transcript.extend([token])
        text += its.target.pieces[token]
        assert transcript.tokens[:same] == before[:same]
        assert same == len(before) or transcript.tokens[same : same + 1] != before[same : same + 1]
        assert shown(its, transcript) == text
        assert len(transcript.held) == incomplete_bytes(text)
        assert len(before) - same < 100  # however long the text is
    assert transcript.tokens[start(its) :] == its.drafter.spell(passage.encode())
    assert Transcript(its, its.target.spell(passage.encode()) or []).tokens == transcript.tokens


@pairs
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_tokens_in_any_steps(pair: tuple[str, str], data: st.DataObject) -> None:
    """Drafts of any kind, accepted up to anywhere, in between: the text is always the target's, to the byte."""
    its, transcript, text, begun = bridge(pair), Transcript(bridge(pair)), b"", False
    some = st.integers(0, its.target.vocab.n_tokens - 1).map(lambda token: [token])
    spelled = texts.map(lambda text: its.target.spell_most(text.encode()))
    for _ in range(data.draw(st.integers(1, 6))):
        tokens = list(itertools.chain.from_iterable(data.draw(st.lists(st.one_of(some, spelled), max_size=3))))
        new = b"".join(its.target.pieces[token] for token in tokens if its.control_to_drafter(token) < 0)
        draft = its.drafter.spell_most(new)
        if data.draw(st.booleans()) and draft:
            at = data.draw(st.integers(0, len(draft) - 1))
            draft[at:] = data.draw(st.lists(st.integers(0, its.drafter.vocab.n_tokens - 1), max_size=3))
        before = [*transcript.tokens, *draft]
        same = transcript.extend(tokens, draft)
        assert before[:same] == transcript.tokens[:same]
        if its.drafter.spells_all:
            assert before[same : same + 1] != transcript.tokens[same : same + 1] or same == len(before)
        bos = its.target.vocab.adds_bos and not begun and tokens[:1] == [its.target.vocab.bos]
        begun = begun or bool(tokens)
        for token in tokens[bos:]:
            piece, control = its.target.pieces[token], its.control_to_drafter(token)
            text += piece or (its.target.vocab.special_bytes(token) if control < 0 else b"")
        if its.drafter.spells_all:
            assert shown(its, transcript) == text
            assert len(transcript.held) <= 3


@pairs
def test_accepted_drafts_stay(pair: tuple[str, str]) -> None:
    """What the drafter has in its cache is good for the next draft, if the target took it."""
    its, odds, stayed = bridge(pair), random.Random(3), 0
    for passage in PASSAGES:
        wanted = its.target.spell(passage.encode()) or []
        transcript, done = Transcript(its, wanted[:1]), 1
        while done < len(wanted):
            left = its.target.text(wanted[done:])
            if transcript.held:
                left = transcript.held + left
            draft = (its.drafter.spell(left) or [])[: odds.randrange(1, 7)]
            mapped = its.to_target(draft, final=True, held=transcript.held)
            accepted = 0
            while accepted < min(len(mapped), len(wanted) - done) and mapped[accepted].token == wanted[done + accepted]:
                accepted += 1
            before = list(transcript.tokens)
            text = transcript.held + its.target.text(wanted[done : done + accepted])
            same = transcript.extend(wanted[done : done + accepted], draft)
            ends = list(itertools.accumulate(len(its.drafter.pieces[token]) for token in draft))
            if len(text) in ends:
                kept = ends.index(len(text)) + 1
                stayed += kept
                assert transcript.tokens == before + draft[:kept]
                assert same == len(transcript.tokens)
                assert transcript.held == b""
            done += accepted
            transcript.extend(wanted[done : done + 1])
            done += 1
        assert shown(its, transcript) == passage.encode()
    assert stayed > 100


def test_a_draft_that_is_not_spelled_as_usual_stays_but_for_its_last_word() -> None:
    its = bridge(("smol", "qwen"))
    find = its.drafter.find
    transcript = Transcript(its, its.target.spell(b"Say") or [])
    odd = [find(b" hel"), find(b"lo"), find(b" wor"), find(b"ld")]
    assert transcript.extend(its.target.spell(b" hello world") or [], odd) == 5
    assert transcript.tokens[1:] == odd
    assert transcript.extend([its.target.find(b" is")]) == 3  # "world" is spelled anew with what follows
    assert transcript.tokens[1:] == [find(b" hel"), find(b"lo"), find(b" world"), find(b" is")]
    assert transcript.extend(its.target.spell(b" the end") or [], [find(b" the"), find(b" time")]) == 6
    assert its.drafter.text(transcript.tokens) == b"Say hello world is the end"


def test_characters_that_are_not_complete_wait() -> None:
    its = bridge(("smol", "qwen"))
    first, *others = its.target.spell("🦜".encode()) or []
    assert others
    transcript = Transcript(its, [its.target.find(b"a"), first])
    assert transcript.tokens == [its.drafter.find(b"a")]
    assert transcript.held == its.target.pieces[first]
    assert transcript.extend(others) == 1
    assert (transcript.held, shown(its, transcript)) == (b"", "a🦜".encode())


def test_waiting_bytes_change_nothing() -> None:
    its = bridge(("smol", "qwen"))
    transcript = Transcript(its)
    odd = [its.drafter.find(b" hel"), its.drafter.find(b"lo")]
    transcript.extend([its.target.find(b" hello")], odd)
    first, *_ = its.target.spell("🦜".encode()) or []
    assert transcript.extend([first]) == 2
    assert transcript.tokens == odd


def test_a_draft_may_end_inside_a_character() -> None:
    its = bridge(("smol", "qwen"))
    transcript = Transcript(its, [its.target.find(b"a")])
    draft = its.to_drafter("🦜".encode())
    wanted = its.target.spell("🦜".encode()) or []
    mapped = its.to_target(draft, final=True)
    assert [m.token for m in mapped] == wanted
    same = transcript.extend(wanted[:1], draft)
    assert shown(its, transcript) == b"a" + its.target.pieces[wanted[0]]
    assert same >= 1
    transcript.extend(wanted[1:])
    assert transcript.tokens == [its.drafter.find(b"a"), *draft]


def test_control_tokens_are_the_drafters_or_text() -> None:
    qwen = vocabulary("qwen")
    its = bridge(("smol", "qwen"))
    hello = its.target.find(b" hello")
    transcript = Transcript(its, [hello, qwen.eos, hello])
    plain = its.drafter.find(b" hello")
    assert transcript.tokens == [plain, vocabulary("smol").eos, plain]
    assert transcript.extend([qwen.eos, hello], [vocabulary("smol").eos, plain]) == 5
    assert transcript.extend([qwen.eos], [plain]) == 5
    its = bridge(("gemma", "qwen"))
    transcript = Transcript(its, [hello, qwen.eos])
    assert transcript.tokens[0] == vocabulary("gemma").bos
    assert its.drafter.text(transcript.tokens) == b" hello<|im_end|>"


def test_the_targets_bos_is_not_text() -> None:
    gemma = vocabulary("gemma")
    its = bridge(("qwen", "gemma"))
    hello = its.target.find(b"hello")
    assert Transcript(its, [gemma.bos, hello]).tokens == [its.drafter.find(b"hello")]
    late = Transcript(its)
    late.extend([])
    late.extend([gemma.bos, hello])
    assert late.tokens == [its.drafter.find(b"hello")]


@pytest.mark.parametrize("text", ["文" * 400, "x" * 400, "\n" * 400, "7" * 400, "🙂" * 200, "ab" * 300])
@pairs
def test_runs_without_a_place_to_cut(pair: tuple[str, str], text: str) -> None:
    """Only so much is spelled anew, and the text is right all the same."""
    its = bridge(pair)
    transcript = Transcript(its)
    for token in its.target.spell(text.encode()) or []:
        before = len(transcript.tokens)
        assert before - transcript.extend([token]) <= 160
        assert len(transcript._tail_text) <= 160
    assert shown(its, transcript) == text.encode()
    usual = its.to_drafter(text.encode())
    assert len(transcript.tokens) <= 1.25 * len(usual) + 8


def test_bytes_that_the_drafter_lacks_are_left_out() -> None:
    its = bridge(("smol", "qwen"))
    lacking = next(byte for byte in range(128, 256) if its.drafter.find(bytes([byte])) < 0)
    token, hello = its.target.find(bytes([lacking])), its.target.find(b" hello")
    transcript = Transcript(its, [hello, token, hello])
    transcript.extend([token])
    transcript.extend([hello, hello, token, hello, hello])
    for _ in range(3):
        transcript.extend([hello])
    assert its.drafter.text(transcript.tokens) == b" hello" * 9
