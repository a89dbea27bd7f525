"""Tools and JSON formats on the bundled model: what a grammar dictates holds, whatever the model would have said."""

from __future__ import annotations

import json

import jsonschema
import pydantic
import pytest

MODEL = "smollm2-135m-instruct"
ASK = [{"role": "user", "content": "What is the weather in Paris, and what time is it in Tokyo?"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Tokyo"]}, "unit": {"enum": ["C", "F"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}
CLOCK = {
    "type": "object",
    "properties": {"zone": {"type": "string", "maxLength": 12}},
    "required": ["zone"],
    "additionalProperties": False,
}
SCHEMAS = {"weather": WEATHER, "clock": CLOCK}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"Tells the {name}", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def _check_call(name: str, arguments: str) -> None:
    jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "clock"}),
        ({"type": "function", "function": {"name": "clock"}}, {"clock"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "weather"}}],
                },
            },
            {"weather"},
        ),
    ],
    ids=["required", "named", "allowed"],
)
def test_a_forced_call_is_valid_for_its_schema(client, choice, names, seed):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        tools=TOOLS,
        tool_choice=choice,
        max_tokens=120,
        temperature=1,
        seed=seed,
        parallel_tool_calls=False,
    )
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    assert call.type == "function"
    assert call.id
    assert call.function.name in names
    _check_call(call.function.name, call.function.arguments)


def test_streamed_fragments_join_to_the_same_call(client):
    asked = {"model": MODEL, "messages": ASK, "tools": TOOLS, "tool_choice": "required", "temperature": 0}
    whole = client.chat.completions.create(max_tokens=120, parallel_tool_calls=False, **asked).choices[0]
    stream = client.chat.completions.create(max_tokens=120, parallel_tool_calls=False, stream=True, **asked)
    names, fragments, reasons, content = [], [], [], ""
    for chunk in stream:
        [choice] = chunk.choices
        reasons.append(choice.finish_reason)
        content += choice.delta.content or ""
        for part in choice.delta.tool_calls or ():
            assert part.index == 0
            if part.id:
                assert part.type == "function"
                assert fragments == []
                names.append(part.function.name)
            if part.function.arguments:
                fragments.append(part.function.arguments)
    assert names == [whole.message.tool_calls[0].function.name]
    assert "".join(fragments) == whole.message.tool_calls[0].function.arguments
    assert len(fragments) > 1
    _check_call(names[0], "".join(fragments))
    assert content == ""
    assert reasons[-1] == whole.finish_reason == "tool_calls"


def test_parallel_calls_are_each_valid_and_have_ids_of_their_own(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, tools=TOOLS, tool_choice="required", max_tokens=200, temperature=1.5, seed=3
    )
    [choice] = answer.choices
    calls = choice.message.tool_calls
    if choice.finish_reason == "length":
        calls = calls[:-1]  # the last one was cut off
    for call in calls:
        _check_call(call.function.name, call.function.arguments)
    assert len({call.id for call in calls}) == len(calls)


def test_none_hides_the_tools(client):
    asked = {"model": MODEL, "messages": ASK, "max_tokens": 8, "temperature": 0}
    plain = client.chat.completions.create(**asked)
    none = client.chat.completions.create(tools=TOOLS, tool_choice="none", **asked)
    auto = client.chat.completions.create(tools=TOOLS, **asked)
    assert none.choices[0].message.content == plain.choices[0].message.content
    assert none.choices[0].message.tool_calls is None
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens
    assert auto.usage.prompt_tokens > plain.usage.prompt_tokens


def test_auto_answers_in_text_or_in_valid_calls(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, tools=TOOLS, tool_choice="auto", max_tokens=60, temperature=1, n=3, seed=1
    )
    for choice in answer.choices:
        if choice.finish_reason == "tool_calls":
            for call in choice.message.tool_calls:
                _check_call(call.function.name, call.function.arguments)
        else:
            assert choice.message.content


def test_auto_reads_a_call_of_the_models_own(client):
    said = '<tool_call>\\n{\\"name\\": \\"clock\\", \\"arguments\\": {\\"zone\\": \\"Asia/Tokyo\\"}}\\n</tool_call>'
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, tools=TOOLS, max_tokens=80, extra_body={"grammar": f'root ::= "{said}"'}
    )
    [choice] = answer.choices
    [call] = choice.message.tool_calls
    assert call.function.name == "clock"
    assert json.loads(call.function.arguments) == {"zone": "Asia/Tokyo"}
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None


def test_json_object_gives_an_object(client):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": 'Answer with the JSON object {"ok": true}'}],
        response_format={"type": "json_object"},
        max_tokens=200,
        temperature=0,
    )
    [choice] = answer.choices
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    else:  # cut off: still the beginning of an object
        assert choice.message.content.lstrip().startswith("{")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_json_schema_gives_an_instance(client, seed):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Describe a person as JSON."}],
        response_format={"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}},
        max_tokens=200,
        temperature=1.5,
        seed=seed,
    )
    [choice] = answer.choices
    assert choice.finish_reason == "stop"
    jsonschema.validate(json.loads(choice.message.content), PERSON)


def test_the_clients_parse_helper_works_with_pydantic(client):
    class City(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=12)
        large: bool

    answer = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": "Name a city."}], response_format=City, max_tokens=100
    )
    assert isinstance(answer.choices[0].message.parsed, City)
