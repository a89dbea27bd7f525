"""Drafter tokens as target tokens: always for the same bytes, and as the target would write them."""

from __future__ import annotations

import functools
import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.backend.vocab import TokenKind
from edgellm.speculative.bridge import EVERY_WAY, Bridge, Mapped, Way
from edgellm.speculative.ngram_cache import NgramCache
from tests.support.texts import PASSAGES, texts
from tests.support.vocabularies import REAL, vocabulary

PAIRS = [*itertools.permutations(REAL, 2), ("smol", "smol"), ("smol", "spaced"), ("spaced", "qwen"), ("bytes", "gemma")]
WAYS = [Way.DIRECT, Way.DIRECT | Way.NGRAM, Way.DIRECT | Way.TEXT, EVERY_WAY]

pairs = pytest.mark.parametrize("pair", PAIRS, ids="-".join)


@functools.cache
def bridge(pair: tuple[str, str], ways: Way = EVERY_WAY) -> Bridge:
    """With a cache that has seen PASSAGES."""
    made = Bridge(vocabulary(pair[0]), vocabulary(pair[1]), NgramCache(), ways=ways)
    for passage in PASSAGES:
        made.learn(made.target.spell(passage.encode()) or [])
    return made


def check(its: Bridge, draft: list[int], found: list[Mapped], held: bytes = b"") -> None:
    """Every prefix of `found` stands for a prefix of the draft, and counts the tokens that it touches."""
    shown, ends = b"", [0]
    for token in draft:
        shown += its.drafter.vocab.special_bytes(token) if not its.drafter.pieces[token] else its.drafter.pieces[token]
        ends.append(len(shown))
    at = held
    for mapped in found:
        before = len(at)
        at += its.target.pieces[mapped.token] or its.target.vocab.special_bytes(mapped.token)
        assert shown.startswith(at)
        assert len(at) > before
        assert ends[mapped.count - 1] < len(at) <= ends[mapped.count]
        if mapped.way is Way.DIRECT:
            assert its.direct[draft[mapped.count - 1]] == mapped.token or len(at) - before == len(
                its.drafter.pieces[draft[mapped.count - 1]]
            )
            assert (ends[mapped.count - 1], ends[mapped.count]) == (before, len(at))
        elif mapped.way is Way.NGRAM:
            assert before in ends
            assert len(at) == ends[mapped.count]


@pairs
@pytest.mark.parametrize("ways", WAYS, ids=str)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_what_is_proposed_is_the_drafters_text(pair: tuple[str, str], ways: Way, data: st.DataObject) -> None:
    its = bridge(pair, ways)
    some = st.integers(0, its.drafter.vocab.n_tokens - 1)
    spelled = texts.map(lambda text: its.drafter.spell_most(text.encode()))
    controls = st.sampled_from(sorted(its.drafter.vocab.end_tokens)).map(lambda token: [token])
    parts = st.lists(st.one_of(spelled, some.map(lambda token: [token]), controls), max_size=4)
    draft = list(itertools.chain.from_iterable(data.draw(parts)))
    odds = data.draw(st.lists(st.floats(0.01, 1), min_size=len(draft), max_size=len(draft)))
    found = its.to_target(draft, odds, final=True)
    check(its, draft, found)
    whole = math.prod(mapped.probability for mapped in found)
    assert whole == pytest.approx(math.prod(odds[: found[-1].count] if found else []))
    growing = its.to_target(draft, odds, final=False)
    check(its, draft, growing)
    assert growing == found[: len(growing)]
    if ways & Way.TEXT and all(its.drafter.pieces[token] for token in draft):
        text = its.drafter.text(draft)
        assert [mapped.token for mapped in found] == (its.target.spell(text) or [m.token for m in found])


@pairs
@pytest.mark.parametrize("passage", PASSAGES)
def test_all_of_a_text_is_mapped_as_the_target_writes_it(pair: tuple[str, str], passage: str) -> None:
    its = bridge(pair)
    wanted = its.target.spell(passage.encode())
    found = its.to_target(its.to_drafter(passage.encode()), final=True)
    assert wanted is not None
    assert [mapped.token for mapped in found] == wanted
    again = its.drafter.text(its.to_drafter(its.target.text([mapped.token for mapped in found])))
    assert again == passage.encode()


@pairs
def test_texts_cut_anywhere(pair: tuple[str, str]) -> None:
    """Drafts begin and end in the middle of words and of characters."""
    its, odds = bridge(pair), random.Random(5)
    for passage in PASSAGES:
        tokens = its.to_drafter(passage.encode())
        for _ in range(30):
            start = odds.randrange(len(tokens))
            draft = tokens[start : start + odds.randrange(9)]
            for final in (True, False):
                check(its, draft, its.to_target(draft, final=final))
            assert its.target.spell(its.drafter.text(draft)) == [m.token for m in its.to_target(draft, final=True)]


@pytest.mark.parametrize("pair", [("smol", "qwen"), ("gemma", "smol")], ids="-".join)
def test_words_in_parts_become_one_token(pair: tuple[str, str]) -> None:
    its = bridge(pair, Way.DIRECT | Way.TEXT)
    parts = [its.drafter.find(part) for part in (b" hel", b"lo", b" world")]
    hello, world = its.target.find(b" hello"), its.target.find(b" world")
    assert its.to_target(parts, [0.5, 0.25, 0.5], final=True) == [
        Mapped(hello, 2, 0.125, Way.TEXT),
        Mapped(world, 3, 0.5, Way.DIRECT),
    ]
    help_parts, helped = [its.drafter.find(b" hel"), its.drafter.find(b"p")], its.target.find(b" help")
    assert its.to_target(help_parts, final=False) == []  # " helped" may follow
    assert its.to_target(help_parts, final=True) == [Mapped(helped, 2, 1.0, Way.TEXT)]
    assert [mapped.token for mapped in its.to_target([*help_parts, parts[2]], final=False)] == [helped, world]
    assert its.to_target(parts[:2], final=True) == [Mapped(hello, 2, 1.0, Way.TEXT)]
    assert its.to_target(parts, final=False)[-1] == Mapped(world, 3, 1.0, Way.DIRECT)
    apart = bridge(pair, Way.DIRECT).to_target(parts[:1], final=False)
    assert [its.target.pieces[mapped.token] for mapped in apart] == [b" hel"]


def test_a_token_may_end_inside_a_drafter_token() -> None:
    its = bridge(("gemma", "smol"))
    draft = [its.drafter.find(b"    "), its.drafter.find(b"return")]
    found = its.to_target(draft, [0.5, 0.25], final=True)
    assert [its.target.pieces[mapped.token] for mapped in found] == [b"   ", b" return"]
    assert [(mapped.count, mapped.probability, mapped.way) for mapped in found] == [
        (1, 0.5, Way.TEXT),
        (2, 0.25, Way.TEXT),
    ]


def test_the_cache_maps_what_it_has_seen() -> None:
    for ways in (Way.DIRECT | Way.NGRAM, EVERY_WAY):
        its = Bridge(vocabulary("smol"), vocabulary("qwen"), NgramCache(), ways=ways)
        wanted = its.target.spell(b"foo();\nbar();\n") or []
        draft = its.to_drafter(its.target.text(wanted))
        before = its.to_target(draft, final=True)
        assert all(mapped.way is not Way.NGRAM for mapped in before)
        its.learn(wanted)
        after = its.to_target(draft, final=True)
        check(its, draft, after)
        assert any(mapped.way is Way.NGRAM for mapped in after)
        assert len(its.cache) > 0
        assert [mapped.token for mapped in after] == wanted
        if ways == EVERY_WAY:
            assert [mapped.token for mapped in before] == wanted


def test_learning_files_whole_runs_only() -> None:
    its = Bridge(vocabulary("smol"), vocabulary("qwen"), NgramCache())
    its.learn([])
    its.learn([its.target.find(b" hello"), its.target.vocab.eos, its.target.find(b" world")])
    assert len(its.cache) == 0
    token = its.target.find(b"();\n")
    run = its.to_drafter(b"();\n")
    assert token >= 0
    assert len(run) > 1
    its.learn([token, its.target.vocab.eos, token])
    assert its.cache.longest(run) == (token, len(run))


@pairs
@settings(deadline=None, max_examples=60)
@given(text=texts)
def test_what_is_learned_is_true(pair: tuple[str, str], text: str) -> None:
    its = bridge(pair)
    its.learn(its.target.spell_most(text.encode()))
    for run, (token, _) in its.cache._entries.items():
        assert its.drafter.text(run) == its.target.pieces[token]
        assert len(run) > 1


def test_a_cache_that_lies_is_not_believed() -> None:
    for lie in (1 << 31, 5):
        cache = NgramCache()
        its = Bridge(vocabulary("smol"), vocabulary("qwen"), cache, ways=Way.DIRECT | Way.NGRAM)
        draft = its.to_drafter(b" hello world")
        cache.observe(lie, draft)
        assert [mapped.way for mapped in its.to_target(draft, final=True)] == [Way.DIRECT, Way.DIRECT]


def test_control_tokens_map_by_name_and_to_nothing_else() -> None:
    its = bridge(("smol", "qwen"))
    smol, qwen = vocabulary("smol"), vocabulary("qwen")
    assert its.direct[smol.eos] == qwen.eos
    hello, end = its.drafter.find(b" hello"), smol.eos
    assert [mapped.token for mapped in its.to_target([hello, end, hello], final=False)] == [
        its.target.find(b" hello"),
        qwen.eos,
        its.target.find(b" hello"),
    ]
    assert its.control_to_drafter(qwen.eos) == smol.eos
    its = bridge(("smol", "gemma"))
    assert its.direct[smol.eos] == its.control_to_drafter(vocabulary("gemma").eot) == -1
    assert [mapped.count for mapped in its.to_target([hello, end, hello], final=False)] == [1]
    assert its.to_target([end, hello], final=True) == []


@pytest.mark.parametrize("ways", WAYS, ids=str)
def test_nothing_follows_what_cannot_be_mapped(ways: Way) -> None:
    its = bridge(("qwen", "smol"), ways)
    lacking = next(byte for byte in range(128, 256) if its.target.find(bytes([byte])) < 0)
    draft = [its.drafter.find(b" hello"), its.drafter.find(bytes([lacking])), its.drafter.find(b" world")]
    assert its.target.spell(its.drafter.text(draft)) is None
    assert [its.target.pieces[mapped.token] for mapped in its.to_target(draft, final=True)] == [b" hello"]


def test_a_word_that_an_end_follows_is_complete() -> None:
    its = bridge(("smol", "qwen"))
    draft = [its.drafter.find(b" hel"), its.drafter.find(b"lo"), vocabulary("smol").eos]
    assert [mapped.count for mapped in its.to_target(draft, final=False)] == [2, 3]


@pairs
@pytest.mark.parametrize("ways", WAYS, ids=str)
def test_drafts_that_go_on_inside_a_character(pair: tuple[str, str], ways: Way) -> None:
    its = bridge(pair, ways)
    for character in ("🙂", "é", "文", "हि"):
        text = character.encode() + b" hello"
        draft = its.to_drafter(text)
        for size in (1, 2, 3):
            if size < len(character.encode()):
                found = its.to_target(draft, final=True, held=text[:size])
                check(its, draft, found, text[:size])
                if ways & Way.TEXT:
                    assert b"".join(its.target.pieces[mapped.token] for mapped in found) == text[size:]
        assert its.to_target(draft, final=True, held=b"\x9f") == []
        assert its.to_target([], final=True, held=text[:1]) == []
        ends = [token for token in its.drafter.vocab.end_tokens if its.direct[token] >= 0]
        assert not any(its.to_target([end], final=True, held=text[:1]) for end in ends)


def test_the_first_bytes_of_a_character_are_sure_only_if_they_map_directly() -> None:
    its = bridge(("smol", "gemma"))
    first, *others = its.to_drafter("🙂".encode())
    assert others
    assert len(its.drafter.pieces[first]) > 1
    assert its.direct[first] < 0  # a byte at a time in the target
    hello = its.drafter.find(b" hello")
    assert [mapped.count for mapped in its.to_target([hello, first], final=False)] == [1]
    found = its.to_target([hello, first], final=True)
    assert [mapped.count for mapped in found] == [1] + [2] * len(its.drafter.pieces[first])
    its = bridge(("smol", "qwen"))
    assert its.direct[first] >= 0
    assert [mapped.count for mapped in its.to_target([hello, first], final=False)] == [1, 2]


@pairs
def test_direct_pairs_stand_for_the_same(pair: tuple[str, str]) -> None:
    its = bridge(pair)
    assert len(its.direct) == its.drafter.vocab.n_tokens
    for token, other in enumerate(its.direct):
        if other >= 0 and its.drafter.pieces[token]:
            assert its.target.pieces[other] == its.drafter.pieces[token]
        elif other >= 0:
            assert its.drafter.vocab.kinds[token] is its.target.vocab.kinds[other] is TokenKind.CONTROL
            assert its.drafter.vocab.special_bytes(token) == its.target.vocab.special_bytes(other)
        elif its.drafter.pieces[token]:
            assert its.target.find(its.drafter.pieces[token]) < 0
    if pair[0] == pair[1]:
        assert all(other == token for token, other in enumerate(its.direct) if its.drafter.pieces[token])


@pairs
@settings(deadline=None)
@given(data=st.one_of(st.binary(max_size=30), texts.map(str.encode)))
def test_to_drafter_spells_or_says_that_it_cannot(pair: tuple[str, str], data: bytes) -> None:
    its = bridge(pair)
    tokens = its.to_drafter(data)
    assert its.drafter.text(tokens) == data or (tokens == [] and not its.drafter.spells_all)


def test_ways_need_the_direct_one() -> None:
    with pytest.raises(ValueError, match="directly"):
        Bridge(vocabulary("bytes"), vocabulary("bytes"), NgramCache(), ways=Way.TEXT)
