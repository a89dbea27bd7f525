"""Training files: every kind of fault is told with its line, and what does not fit is told too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.errors import TrainingDataError
from edgellm.models.bundled import bundled_path
from edgellm.tune import data
from edgellm.tune.coding import ModelCoder
from edgellm.tune.data import check_file, load_file
from edgellm.tune.examples import Method, parse_example
from edgellm.tune.faults import FAULTS_MAX, ExampleError
from tests.tune.conftest import QWEN3_LIKE, MakeCoder

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
GOOD = {"messages": [USER, ASSISTANT]}
PAIR = {
    "input": {"messages": [USER]},
    "preferred_output": [ASSISTANT],
    "non_preferred_output": [{"role": "assistant", "content": "What?"}],
}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}


def written(path: Path, *examples: Any) -> Path:
    lines = [item if isinstance(item, bytes) else json.dumps(item).encode() for item in examples]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def faults(path: Path, method: Method = "supervised") -> list[tuple[int, str]]:
    with pytest.raises(TrainingDataError) as caught:
        check_file(path, method)
    assert caught.value.param == "training_file"
    return list(caught.value.faults)


def said(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (b"{", "is not valid JSON: Expecting property name"),
        (b"[]", "The example: must be an object"),
        (b'{"messages": NaN}', "has the number NaN"),
        (b'{"messages": "\xff"}', "is not UTF-8 (byte 15)"),
        (b'{"messages": "\\ud800"}', "lone surrogate"),
        (b"[" * 200_000, "is nested too deeply"),
        (b'{"messages": ' + b"9" * 5000 + b"}", "too many digits"),
        ({}, "messages: must be a list of at least one message"),
        ({"messages": []}, "messages: must be a list of at least one message"),
        ({"messages": [USER, 3]}, "messages[1]: must be an object"),
        ({"prompt": "a", "completion": "b"}, "prompt: is not known here"),
        (PAIR, "has the format of the method 'dpo'"),
        (said(USER), "messages[0]: the last message must be the assistant's"),
        (said(USER, {**ASSISTANT, "weight": 0}), "every message of the assistant has weight 0"),
        (said(USER, {**ASSISTANT, "weight": 2}), "messages[1].weight: must be 0 or 1"),
        (said(USER, {**ASSISTANT, "weight": True}), "messages[1].weight: must be 0 or 1"),
        (said(USER, {**ASSISTANT, "wieght": 1}), "messages[1].wieght: is not known here"),
        (said({**USER, "weight": 1}, ASSISTANT), "messages[0].weight: is not known here"),
        (said({**USER, "role": "human"}, ASSISTANT), "messages[0].role: must be one of system, developer"),
        (said({"role": "user"}, ASSISTANT), "messages[0].content: is missing"),
        (said({**USER, "content": 3}, ASSISTANT), "messages[0].content: must be a string or a list"),
        (said({**USER, "content": [{"type": "image_url"}]}, ASSISTANT), "messages[0].content[0].type: must be text"),
        (said(USER, {**ASSISTANT, "content": " \n"}), "messages[1]: is an empty answer"),
        (said(USER, {"role": "assistant"}), "messages[1]: is an empty answer"),
        (said(USER, {"role": "assistant", "tool_calls": []}), "messages[1].tool_calls: must be a list of 1"),
        (said(USER, {"role": "assistant", "function_call": {}}), "is no longer taken; use tool_calls"),
        (
            said(USER, {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "["}}]}),
            "messages[1].tool_calls[0].function.arguments: must be a JSON object as text",
        ),
        (said(USER, {"role": "tool", "tool_call_id": "c2", "content": "4"}, ASSISTANT), "no tool call before it"),
        (said(USER, ASSISTANT, parallel_tool_calls=1), "parallel_tool_calls: must be true or false"),
        (said(USER, ASSISTANT, tools={}), "tools: must be a list"),
        (said(USER, ASSISTANT, tools=[{"name": "f"}]), "tools[0].name: is not known here"),
        (said(USER, ASSISTANT, tools=[{"type": "function", "function": {"name": "a b"}}]), "tools[0].function.name"),
    ],
)
def test_a_fault_is_told_with_its_line(tmp_path: Path, line: Any, wrong: str) -> None:
    found = faults(written(tmp_path / "train.jsonl", *[GOOD] * 9, line, GOOD))
    assert [number for number, _ in found] == [10]
    assert wrong in found[0][1]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"messages": []}, "has the format of the method 'supervised'"),
        ({"input": None}, "input: must be an object"),
        ({"input": {"messages": [USER, ASSISTANT]}}, "the last message must not be the assistant's"),
        ({"preferred_output": []}, "preferred_output: must be a list"),
        ({"preferred_output": [USER]}, "preferred_output: must be one message of the assistant"),
        ({"non_preferred_output": [ASSISTANT] * 2}, "non_preferred_output: must be one message"),
        ({"non_preferred_output": [ASSISTANT]}, "are the same"),
    ],
)
def test_faults_of_preferences(tmp_path: Path, change: Any, wrong: str) -> None:
    found = faults(written(tmp_path / "train.jsonl", *[PAIR] * 9, {**PAIR, **change}), "dpo")
    assert [number for number, _ in found] == [10]
    assert wrong in found[0][1]


def test_empty_lines_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    lines = [b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), b"", b"  \r", *[json.dumps(GOOD).encode() + b"\r"] * 9]
    assert check_file(written(tmp_path / "train.jsonl", *lines), "supervised") == 10


def test_the_first_faults_are_told_and_reading_stops(tmp_path: Path) -> None:
    path = written(tmp_path / "train.jsonl", *[b"?"] * (FAULTS_MAX + 50))
    with pytest.raises(TrainingDataError, match="there may be more") as caught:
        check_file(path, "supervised")
    assert [line for line, _ in caught.value.faults] == list(range(1, FAULTS_MAX + 1))


def test_too_few_examples(tmp_path: Path) -> None:
    assert faults(written(tmp_path / "train.jsonl", *[GOOD] * 9)) == [
        (0, "the file has 9 examples, but at least 10 are needed")
    ]


def test_files_and_lines_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "LINE_BYTES_MAX", 100)
    path = written(tmp_path / "train.jsonl", *[GOOD] * 9, said(USER, {**ASSISTANT, "content": "x" * 950}), b"?")
    assert [line for line, _ in faults(path)] == [10, 11]
    monkeypatch.setattr(data, "FILE_BYTES_MAX", 100)
    assert faults(path)[0][1].startswith("the file is larger than")


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    assert faults(tmp_path / "nothing")[0][1] == "the file cannot be read: No such file or directory"


def test_messages_are_as_the_server_gives_them_to_the_template() -> None:
    tool = {"function": {"strict": True, "name": "f", "description": "d"}, "type": "function"}
    developer = {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    refusal = {"role": "assistant", "refusal": "No.", "content": None}
    example = parse_example(json.dumps(said(developer, USER, refusal, tools=[tool])).encode(), "supervised")
    assert example.messages == ({"role": "system", "content": "a\nb"}, USER, {"role": "assistant", "content": "No."})
    assert list(example.tools[0]) == ["type", "function"]
    assert list(example.tools[0]["function"]) == ["name", "description", "strict"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "role", "content", "tools", "weight", "input"]), inner, max_size=4
        )
    ),
)


@given(value=json_values, method=st.sampled_from(["supervised", "dpo"]))
def test_whatever_json_comes_is_refused_in_words(value: Any, method: Method) -> None:
    with pytest.raises(ExampleError):
        parse_example(json.dumps(value).encode(), method)


@given(st.binary(max_size=60))
def test_whatever_bytes_come_are_refused_in_words(line: bytes) -> None:
    with pytest.raises(ExampleError):
        parse_example(line, "supervised")


class TestLoading:
    def test_answers_that_the_template_rewrites_are_told(
        self, tmp_path: Path, make_coder: MakeCoder, smol: ModelCoder
    ) -> None:
        turns = said(USER, ASSISTANT, USER, ASSISTANT)
        path = written(tmp_path / "train.jsonl", *[GOOD] * 9, turns)
        found = load_file(path, "supervised", make_coder(bundled_path(), QWEN3_LIKE), 64)
        assert found.told.rewritten == 1
        assert [notice.line for notice in found.told.notices] == [10]
        assert load_file(path, "supervised", smol, 64).told.rewritten == 0

    def test_long_examples_are_cut_or_left_out(self, tmp_path: Path, smol: ModelCoder) -> None:
        long_answer = said(USER, {**ASSISTANT, "content": "word " * 100})
        long_question = said({**USER, "content": "word " * 100}, ASSISTANT)
        path = written(tmp_path / "train.jsonl", *[GOOD] * 9, long_answer, long_question)
        found = load_file(path, "supervised", smol, 64)
        assert len(found.sequences) == 10
        assert max(len(sequence.tokens) for sequence in found.sequences) == 64
        assert (found.told.cut, found.told.left_out) == (1, 1)
        assert [notice.line for notice in found.told.notices] == [10, 11]

    def test_pairs_that_are_too_long_are_left_out_whole(self, tmp_path: Path, smol: ModelCoder) -> None:
        long = {**PAIR, "preferred_output": [{**ASSISTANT, "content": "word " * 100}]}
        found = load_file(written(tmp_path / "train.jsonl", *[PAIR] * 9, long), "dpo", smol, 64)
        assert len(found.pairs) == 9
        assert found.told.left_out == 1
        pair = found.pairs[0]
        start = int(pair.preferred.mask.argmax())
        assert pair.preferred.tokens[:start].tolist() == pair.rejected.tokens[:start].tolist()
        assert smol.spell(pair.preferred.tokens[pair.preferred.mask].tolist()) == b"Hello<|im_end|>"
        assert smol.spell(pair.rejected.tokens[pair.rejected.mask].tolist()) == b"What?<|im_end|>"

    def test_nothing_within_the_training_length(self, tmp_path: Path, smol: ModelCoder) -> None:
        with pytest.raises(TrainingDataError, match="within the training length of 4 tokens"):
            load_file(written(tmp_path / "train.jsonl", *[GOOD] * 10), "supervised", smol, 4)

    def test_faults_of_format_and_of_template_are_told_together(self, tmp_path: Path, smol: ModelCoder) -> None:
        class Refusing(ModelCoder):
            def render(self, messages: Any, tools: Any, *, prompt: bool) -> str:
                raise ExampleError("no")

        coder = Refusing.__new__(Refusing)
        path = written(tmp_path / "train.jsonl", GOOD, b"?", *[GOOD] * 9)
        with pytest.raises(TrainingDataError) as caught:
            load_file(path, "supervised", coder, 64)
        assert [line for line, _ in caught.value.faults] == [1, 2, *range(3, 12)]
