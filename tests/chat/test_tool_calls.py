"""The tool call parser: what it finds, that pieces make no difference, that no text is lost."""

from __future__ import annotations

import itertools
import json
import random
import re
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgellm.chat.json_schema import MAX_CALLS, tool_call_gbnf
from edgellm.chat.tool_calls import (
    ContentDelta,
    ToolCallArguments,
    ToolCallEvent,
    ToolCallFormat,
    ToolCallParser,
    ToolCallStart,
    detect_format,
    lazy_patterns,
    new_call_id,
)
from edgellm.errors import RequestError, SchemaError
from tests.chat.grammars import Vocabulary

FORMATS: tuple[ToolCallFormat, ...] = get_args(ToolCallFormat)
Parsed = tuple[str, list[tuple[str, str]]]


def parse(format: ToolCallFormat, pieces: list[str], *, parallel: bool = True) -> list[ToolCallEvent]:
    ids = itertools.count()
    parser = ToolCallParser(format, parallel=parallel, new_id=lambda: f"id{next(ids)}")
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    assert parser.done
    joined: list[ToolCallEvent] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, ContentDelta):
            assert event.text
            if isinstance(last, ContentDelta):
                joined[-1] = ContentDelta(last.text + event.text)
                continue
        if isinstance(event, ToolCallArguments):
            assert event.fragment
            if isinstance(last, ToolCallArguments):
                assert last.index == event.index
                joined[-1] = ToolCallArguments(last.index, last.fragment + event.fragment)
                continue
            assert isinstance(last, ToolCallStart)
        joined.append(event)
    return joined


def summary(events: list[ToolCallEvent]) -> Parsed:
    content, calls = "", []
    for event in events:
        match event:
            case ContentDelta(text=text):
                content += text
            case ToolCallStart(index=index, id=call_id, name=name):
                assert (index, call_id) == (len(calls), f"id{index}")
                calls.append((name, ""))
            case ToolCallArguments(index=index, fragment=fragment):
                calls[index] = (calls[index][0], calls[index][1] + fragment)
    return content, calls


CASES: list[tuple[ToolCallFormat, str, Parsed]] = [
    ("hermes", "Hello <b>you</b>\n", ("Hello <b>you</b>\n", [])),
    (
        "hermes",
        '<tool_call>\n{"name": "f", "arguments": {"a": [1, "}"]}}\n</tool_call>',
        ("", [("f", '{"a": [1, "}"]}')]),
    ),
    ("hermes", 'So: <tool_call>{"name":"f","arguments":{ }}</tool_call>\n', ("So: ", [("f", "{ }")])),
    (
        "hermes",
        '\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {"x": "\\"<"}}\n</tool_call>\n',
        ("", [("f", "{}"), ("g", '{"x": "\\"<"}')]),
    ),
    ("hermes", '<tool_call>{"name":"f","arguments":{}}</tool_call> and more', (" and more", [("f", "{}")])),
    ("hermes", '<tool_call>{"arguments": {"a":1}, "id": 7, "name": "f"}</tool_call>', ("", [("f", '{"a":1}')])),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", [("f", '{"a": 1}')])),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', ("", [("f", "{}")])),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', ("", [("f", "{}")])),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}', ("", [("f", "{}")])),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1', ("", [("f", '{"a": 1')])),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}<tool_call>{"name": "g"}', ("", [("f", "{}"), ("g", "{}")])),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}} oops</tool_call>', (" oops</tool_call>", [("f", "{}")])),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', None),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>', None),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>', None),
    ("hermes", "<tool_call>\n<function=f>\n</function>\n</tool_call>", None),
    ("hermes", '<tool_call>{"name": "f", "argum', None),
    ("hermes", "<tool_call>", None),
    ("hermes", "a <tool_cal", None),
    ("hermes", "<<tool_call>>", None),
    ("hermes", '<tool_call>x<tool_call>{"name":"f"}</tool_call>', ("<tool_call>x", [("f", "{}")])),
    ("hermes", '{"name": "f", "arguments": {}}', None),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
        ("", [("f", '{"a": 1}'), ("g", "{}")]),
    ),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "abc"}]', ("", [("f", "{}")])),
    ("mistral", "Let me [TOOL", None),
    ("mistral", "[TOOL_CALLS] none", None),
    ("llama3", ' {"name": "f", "parameters": {"a": 1}}', ("", [("f", '{"a": 1}')])),
    (
        "llama3",
        '{"type": "function", "name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
        ("", [("f", "{}"), ("g", "{}")]),
    ),
    ("llama3", '{"name": "Alice", "age": 3}', None),
    ("llama3", 'See: {"name": "f", "parameters": {}}', None),
    ("json", '{"name": "f", "arguments": {"a": 1}}', ("", [("f", '{"a": 1}')])),
    ("json", '[{"name": "f", "arguments": {}},\n {"name": "g", "arguments": {}}]\n', ("", [("f", "{}"), ("g", "{}")])),
    ("json", "[1, 2]", None),
    ("json", "[]", None),
    ("json", "  \n", None),
]


@pytest.mark.parametrize(("format", "text", "expected"), CASES)
def test_whole_and_character_by_character(format: ToolCallFormat, text: str, expected: Parsed | None) -> None:
    expected = expected or (text, [])  # no call: the text as it is
    assert summary(parse(format, [text])) == expected
    assert summary(parse(format, list(text))) == expected


SNIPPETS = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    '{"name": "f", "arguments": ',
    '{"name": "f", "parameters": ',
    '{"arguments": {"a": [{}]}, "name": "g"}',
    '{"a": "\\"}{"}',
    *'{}[],:;<> \n"\\ax',
    '"name"',
    '"arguments"',
    "null",
]
TEXTS = st.lists(st.one_of(st.sampled_from(SNIPPETS), st.text(max_size=3)), max_size=14).map("".join)
TAGGED = '<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call>"}}\n</tool_call>'


@settings(deadline=None)
@given(st.sampled_from(FORMATS), TEXTS, st.lists(st.integers(0, 80), max_size=8))
@example("hermes", TAGGED + "\n<tool" + TAGGED, [3, 40, 90])
def test_pieces_make_no_difference_and_no_text_is_lost(format: ToolCallFormat, text: str, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    whole = parse(format, [text])
    assert parse(format, [text[a:b] for a, b in itertools.pairwise(edges)]) == whole
    assert parse(format, list(text)) == whole
    content, calls = summary(whole)
    if not calls:
        assert content == text
        return
    # What is missing from the content lies around the calls, and is nothing but a call's own text.
    at = 0
    for event in whole:
        if isinstance(event, ContentDelta):
            skipped, at = text[at : text.index(event.text, at)], text.index(event.text, at) + len(event.text)
            assert not skipped or re.search(r'"|[{}\[\]]', skipped) or not skipped.strip(" \t\r\n")
        elif isinstance(event, ToolCallArguments) and event.fragment != "{}" and event.fragment in text[at:]:
            at = text.index(event.fragment, at) + len(event.fragment)


JSON_OBJECTS = st.dictionaries(
    st.text(max_size=5),
    st.recursive(st.none() | st.integers() | st.text(max_size=8), st.lists, max_leaves=4),
    max_size=3,
)
CALLS = st.lists(st.tuples(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), JSON_OBJECTS), min_size=1, max_size=3)


@settings(deadline=None)
@given(CALLS, st.text(alphabet="ab <\n", max_size=8), st.sampled_from([None, 2]), st.integers(1, 9))
def test_well_formed_calls_come_back(
    calls: list[tuple[str, dict[str, Any]]], before: str, indent: int | None, size: int
) -> None:
    texts = [(name, json.dumps(arguments, indent=indent, ensure_ascii=False)) for name, arguments in calls]
    text = before + "\n".join(f'<tool_call>\n{{"name": "{n}", "arguments": {a}}}\n</tool_call>' for n, a in texts)
    content, found = summary(parse("hermes", [text[i : i + size] for i in range(0, len(text), size)]))
    assert found == texts
    assert content == (before if before.strip() else "")
    listed = json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls])
    _, found = summary(parse("json", [listed]))
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls
    assert summary(parse("mistral", [f"[TOOL_CALLS] {listed}"])) == summary(parse("json", [listed]))


def test_events_come_as_early_as_they_can() -> None:
    parser = ToolCallParser("hermes", new_id=lambda: "id")
    assert parser.feed("Well <b") == [ContentDelta("Well <b")]
    assert parser.feed(" <tool") == [ContentDelta(" ")]
    assert parser.feed('_call>{"name": "f", "argu') == []
    assert parser.feed('ments": {"a"') == [ToolCallStart(0, "id", "f"), ToolCallArguments(0, '{"a"')]
    assert parser.feed(": 1") == [ToolCallArguments(0, ": 1")]
    assert parser.feed("}}\n</tool_call>") == [ToolCallArguments(0, "}")]
    assert parser.finish() == []


def test_one_call_at_a_time() -> None:
    parser = ToolCallParser("hermes", parallel=False)
    parser.feed(TAGGED[: -len("\n</tool_call>")])
    assert parser.done
    assert parser.feed(TAGGED) == parser.finish() == []


def test_ids() -> None:
    assert re.fullmatch(r"call_[A-Za-z0-9]{24}", new_call_id())
    assert len({new_call_id() for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("source", "format"),
    [
        (None, "hermes"),
        ("{{ messages }}", "hermes"),
        ("... <tool_call> ...", "hermes"),
        ("[AVAILABLE_TOOLS] ... [TOOL_CALLS] ...", "mistral"),
        ('Environment: ipython {"name": function name, "parameters": ...} <|python_tag|>', "llama3"),
    ],
)
def test_detect_format(source: str | None, format: ToolCallFormat) -> None:
    assert detect_format(source) == format


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"$ref": "#/$defs/days"}},
                "required": ["city"],
                "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 7}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_grammar_and_parser_agree(format: ToolCallFormat, parallel: bool, vocabulary: Vocabulary) -> None:
    grammar = vocabulary.grammar(tool_call_gbnf(TOOLS, format=format, parallel=parallel))
    rng = random.Random(f"{format}{parallel}")
    for _ in range(10):
        text = grammar.walk(rng)
        content, calls = summary(parse(format, list(text)))
        assert content == ""
        assert 1 <= len(calls) <= (MAX_CALLS if parallel else 1)
        for name, arguments in calls:
            given = json.loads(arguments)
            assert given == {} if name == "now" else name == "weather" and 1 <= given.get("days", 1) <= 7
            assert name == "now" or len(given["city"]) <= 8
    grammar.close()


def test_grammar_of_a_named_tool(vocabulary: Vocabulary) -> None:
    grammar = vocabulary.grammar(tool_call_gbnf(TOOLS, format="hermes", name="weather", parallel=False))
    assert grammar.accepts('<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>')
    assert not grammar.accepts('<tool_call>\n{"name": "weather", "arguments": {"days": 3}}\n</tool_call>')
    assert not grammar.accepts('<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
    grammar.close()


def test_grammar_errors_say_where() -> None:
    with pytest.raises(RequestError, match="no such tool"):
        tool_call_gbnf(TOOLS, format="hermes", name="other")
    with pytest.raises(RequestError, match="no tools"):
        tool_call_gbnf([], format="hermes")
    bad = {"type": "function", "function": {"name": "x", "parameters": {"properties": {"a": {"not": {}}}}}}
    with pytest.raises(SchemaError) as caught:
        tool_call_gbnf([TOOLS[0], bad], format="json")
    assert caught.value.path == "/1/function/parameters/properties/a/not"


@pytest.mark.parametrize(
    ("format", "before", "call"),
    [
        ("hermes", "Let me see. <tool", '_call>\n{"name": "now", "arguments": {}}\n</tool_call>'),
        ("mistral", "[TOOL_CALLS", '] [{"name": "now", "arguments": {}}]'),
        ("llama3", "\n", '{"name": "now", "parameters": {}}'),
    ],
)
def test_a_lazy_grammar_takes_over_at_the_trigger(
    format: ToolCallFormat, before: str, call: str, vocabulary: Vocabulary
) -> None:
    gbnf = tool_call_gbnf(TOOLS, format=format, name="now", parallel=False)
    grammar = vocabulary.grammar(gbnf, lazy_patterns=lazy_patterns(format))
    assert grammar.accepts(before + "anything at all")
    assert grammar.accepts(before + call)
    assert not grammar.accepts(before + call + "x")
    assert not grammar.accepts(before + call.replace("now", "not"))
    grammar.close()
    assert lazy_patterns("json") == ()
