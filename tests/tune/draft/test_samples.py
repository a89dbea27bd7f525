"""Data for a drafter: what a file may hold, and what the drafter sees of an answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.errors import TrainingDataError
from edgellm.speculative.bridge import Bridge
from edgellm.speculative.drafter import CELLS
from edgellm.speculative.ngram_cache import NgramCache
from edgellm.tune.draft.samples import Row, hold_out, make_sample, read_rows
from tests.support.texts import PASSAGES
from tests.support.vocabularies import vocabulary

_VOCABULARY = 1000


def _write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def bridge() -> Bridge:
    return Bridge(vocabulary("smol"), vocabulary("qwen"), NgramCache())


def test_lines_of_every_kind(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    lines = ({"prompt": [1, 2], "answer": [3], "kind": "a"}, "", {"prompt": [4]}, {"messages": messages})
    assert read_rows(_write(tmp_path / "d.jsonl", *lines), _VOCABULARY) == [
        Row([1, 2], [3], kind="a"),
        Row([4]),
        Row(messages=messages),
    ]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "Expecting"),
        ([], "is not a JSON object"),
        ({"prompt": []}, "prompt is empty"),
        ({"answer": [1]}, "prompt is not a list"),
        ({"prompt": [_VOCABULARY]}, "prompt is not a list of the target's tokens"),
        ({"prompt": [True]}, "prompt is not a list of the target's tokens"),
        ({"prompt": [1], "answer": [-1]}, "answer is not a list"),
        ({"prompt": [1], "kind": 1}, "kind is not a string"),
        ({"messages": []}, "messages is not a list of messages"),
        ({"messages": [{"content": "x"}]}, "a message has no role"),
        ({"messages": [{"role": "user", "content": None}]}, "content of a message"),
        ("[" * 100_000, "nested too deeply|Expecting"),
    ],
)
def test_what_is_wrong_is_told_by_line(tmp_path: Path, line: object, fault: str) -> None:
    path = _write(tmp_path / "d.jsonl", {"prompt": [1]}, line)
    with pytest.raises(TrainingDataError, match=fault) as caught:
        read_rows(path, _VOCABULARY)
    assert [number for number, _ in caught.value.faults] == [2]


def test_files_that_say_nothing(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", _write(tmp_path / "empty.jsonl")):
        with pytest.raises(TrainingDataError):
            read_rows(path, _VOCABULARY)
    (tmp_path / "raw.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(TrainingDataError, match="cannot be read"):
        read_rows(tmp_path / "raw.jsonl", _VOCABULARY)


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2000) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["prompt", "answer", "messages", "kind", "role", "content"]), inner, max_size=3
        )
    ),
    max_leaves=12,
)


@given(value=_values)
def test_any_json_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(json.dumps(value) + "\n")
    try:
        (row,) = read_rows(path, _VOCABULARY)
    except TrainingDataError:
        return
    assert row.messages or row.prompt
    assert all(0 <= token < _VOCABULARY for token in [*row.prompt, *row.answer])


@pytest.mark.parametrize("text", PASSAGES)
def test_a_sample_is_the_text_and_its_answer_is_learned(bridge: Bridge, text: str) -> None:
    target, drafter = bridge.target, bridge.drafter
    prompt = target.vocab.tokenize("<|im_start|>assistant\n", add_special=False, parse_special=True)
    answer = target.vocab.tokenize(text, add_special=False, parse_special=False)
    sample = make_sample(bridge, prompt, answer)
    assert sample is not None
    spelled = b"".join(drafter.vocab.special_bytes(token) for token in sample.tokens)
    # What the drafter's vocabulary cannot spell it does not get to see.
    expected = drafter.text(drafter.spell_most(text.encode()))
    assert spelled == b"<|im_start|>assistant\n" + expected
    learned = drafter.text(sample.tokens[sample.start :])
    assert learned.endswith(expected)
    assert len(learned) <= len(expected) + len(b"assistant\n")


def test_long_prompts_and_answers_are_cut_as_the_drafter_does(bridge: Bridge) -> None:
    words = bridge.target.vocab.tokenize("one two three " * 400, add_special=False, parse_special=False)
    sample = make_sample(bridge, words, words)
    assert sample is not None
    assert len(sample.tokens) == CELLS
    assert 200 < sample.start < 300
    assert make_sample(bridge, words, []) is None


@given(count=st.integers(2, 500), share=st.floats(0.01, 0.99), seed=st.integers(0, 5))
def test_what_is_held_out(count: int, share: float, seed: int) -> None:
    train, held = hold_out(count, share, seed)
    assert sorted(train + held) == list(range(count))
    assert train
    assert held
    assert abs(len(held) - share * count) <= 1
    assert hold_out(count, share, seed) == (train, held)
