"""JSON Schema to GBNF, checked by llama.cpp (it compiles, accepts, walks) and the jsonschema package (it validates)."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgellm.chat.json_schema import json_object_gbnf, schema_to_gbnf
from edgellm.errors import SchemaError
from tests.chat.grammars import Vocabulary

Validator = jsonschema.Draft202012Validator

NODE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["value", "next"],
    "additionalProperties": False,
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name"],
}


def thing(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


# name: (schema, texts that must pass, texts that must not)
CASES: dict[str, tuple[Any, list[str], list[str]]] = {
    "anything": ({}, ["1", '{"a":[true,null]}', '"x"', "-0.5e3", "[]"], ["", "{", "tru", "01", "1.", '"\n"']),
    "true": (True, ["{}"], ["}"]),
    "string": ({"type": "string"}, ['""', '"é😀"', '"\\n\\u00e9"', '"\\ud83d\\ude00"'], ['"\\ud83d"', '"\\x"', '"\t"']),
    "short string": ({"type": "string", "minLength": 2, "maxLength": 3}, ['"ab"', '"é😀a"'], ['"a"', '"abcd"']),
    "escapes count once": ({"type": "string", "maxLength": 1}, ['"\\u0041"', '"\\ud83d\\ude00"'], ['"\\n\\n"']),
    "boolean or null": ({"type": ["boolean", "null"]}, ["true", "false", "null"], ["1", '"true"']),
    "integer": ({"type": "integer"}, ["0", "-1", "123456789012345678"], ["-0", "01", "1.0", "1e3", ""]),
    "byte": ({"type": "integer", "minimum": 0, "maximum": 255}, ["0", "9", "99", "255"], ["256", "-1", "00"]),
    "around zero": ({"type": "integer", "minimum": -12, "maximum": 7}, ["-12", "-1", "0", "7"], ["-13", "8"]),
    "negative": ({"type": "integer", "minimum": -500, "exclusiveMaximum": -99}, ["-500", "-100"], ["-99", "-501", "1"]),
    "at least": ({"type": "integer", "exclusiveMinimum": 41.5}, ["42", "1000"], ["41", "-42", "0"]),
    "at most": ({"type": "integer", "maximum": 5}, ["5", "-123456"], ["6", "50"]),
    "64 bits": (
        {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1},
        ["-9223372036854775808", "18446744073709551615"],
        ["-9223372036854775809", "18446744073709551616"],
    ),
    "number": ({"type": "number"}, ["-0.5", "1e10", "3.25E-2", "0"], [".5", "1e", "1e999", "NaN", "+1"]),
    "unit interval": (
        {"type": "number", "minimum": 0, "maximum": 1},
        ["0", "0.5", "1", "1.0", "0.0", "0.999"],
        ["1.01", "-0.1", "2", "1e0"],
    ),
    "open interval": (
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        ["0.5", "0.001", "0.999"],
        ["0", "0.0", "1", "1.0", "-0.5"],
    ),
    "decimal bounds": (
        {"type": "number", "minimum": -1.25, "maximum": 10.75},
        ["-1.25", "-1.250", "-0.3", "0", "-0", "10.75", "10.7", "9.99", "10"],
        ["-1.251", "-1.3", "10.76", "10.751", "11", "-2"],
    ),
    "narrow": (
        {"type": "number", "minimum": 0.125, "exclusiveMaximum": 0.13},
        ["0.125", "0.1299"],
        ["0.13", "0.12", "0"],
    ),
    "number at most -2": ({"type": "number", "maximum": -2}, ["-2", "-2.5", "-100"], ["-1.9", "0", "2"]),
    "enum": (
        {"enum": ["red", 'gr"een', 3, None, [1, {"a": 2}]]},
        ['"red"', "3", '[1, {"a": 2}]', '"gr\\"een"'],
        ["red", '"re"'],
    ),
    "const": ({"const": {"kind": "x", "n": 1.5}}, ['{"kind":"x","n":1.5}'], ["{}", '{"n":1.5,"kind":"x"}']),
    "typed enum": ({"type": "string", "enum": ["a", 1, "bb"], "maxLength": 1}, ['"a"'], ["1", '"bb"']),
    "wide enum": (
        {"enum": [f"{word}{n}" for word in ("al", "alpha", "beta") for n in range(40)] + ["al", ""]},
        ['"al"', '""', '"alpha7"', '"beta39"', '"al39"'],
        ['"alp"', '"beta40"', '"a"'],
    ),
    "object": (
        thing(a={"type": "integer"}, b={"type": "string"}),
        ['{"a":1,"b":""}', '{"a": 1, "b": ""}', '{\n  "a": 1,\n  "b": ""\n}'],
        [
            '{"b":"","a":1}',
            '{"a":1}',
            '{"a":1,"b":"",}',
            '{"a":1,"b":"","c":1}',
            '{"a":1,"b":""}}',
            '{\n\n"a":1,"b":""}',
        ],
    ),
    "optional": (
        {"type": "object", "properties": {k: {"type": "boolean"} for k in "abcd"}, "required": ["c"]},
        ['{"c":true}', '{"a":true,"c":true}', '{"b":true,"c":true,"d":false}', '{"a":true,"b":true,"c":true,"d":true}'],
        ["{}", '{"a":true}', '{"c":true,"a":true}', '{,"c":true}', '{"c":true "d":true}'],
    ),
    "all optional": (
        {"type": "object", "properties": {k: {"type": "null"} for k in "abc"}},
        ["{}", '{"b":null}', '{"a":null,"c":null}'],
        ['{"c":null,"a":null}', '{"x":null}'],
    ),
    "at least one": (
        {"type": "object", "properties": {k: {"type": "null"} for k in "ab"}, "minProperties": 1},
        ['{"b":null}', '{"a":null,"b":null}'],
        ["{}", "{ }"],
    ),
    "free object": ({"type": "object"}, ["{}", '{"a":{"b":[]}}'], ["[]"]),
    "no properties": ({"type": "object", "properties": {}}, ["{}", "{ }"], ['{"a":1}']),
    "map": (
        {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 2},
        ['{"x":1}', '{"x":1,"y":2}'],
        ["{}", '{"x":"1"}', '{"x":1,"y":2,"z":3}'],
    ),
    "map with named keys": (
        {"type": "object", "propertyNames": {"pattern": "^k[0-9]$"}, "additionalProperties": {"type": "null"}},
        ["{}", '{"k1":null}'],
        ['{"k":null}', '{"k1":1}'],
    ),
    "open object": (
        {**PERSON, "additionalProperties": {"type": "null"}},
        ['{"name":"x"}', '{"name":"x","nam":null,"names":null,"":null}', '{"name":"x","age":3,"z":null}'],
        ['{"name":"x","name":null}', '{"name":"x","age":null}', '{"name":"x","ag\\u0065":null}', '{"z":null}'],
    ),
    "required but not described": ({"type": "object", "required": ["id"]}, ['{"id":1}', '{"id":{},"x":2}'], ["{}"]),
    "array": ({"type": "array", "items": {"type": "integer"}}, ["[]", "[1]", "[1, 2]"], ["[1,]", "[,1]", '["1"]']),
    "bounded array": (
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
        ["[true,false]", "[true,true,true]"],
        ["[]", "[true]", "[true,true,true,true]"],
    ),
    "empty array": ({"type": "array", "maxItems": 0}, ["[]", "[ ]"], ["[1]"]),
    "tuple": (
        {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "minItems": 2, "items": False},
        ['["a",1]'],
        ['["a"]', "[]", '["a",1,2]', '[1,"a"]'],
    ),
    "tuple with more": (
        {"prefixItems": [{"const": "op"}, {"type": "null"}], "items": {"type": "integer"}, "maxItems": 4},
        ["[]", '["op"]', '["op",null]', '["op",null,1,2]'],
        ['["op",1]', '["op",null,1,2,3]', "[null]"],
    ),
    "tuple with many more": (
        {"type": "array", "prefixItems": [{"type": "null"}], "items": {"type": "integer"}, "minItems": 3},
        ["[null,1,2]", "[null,1,2,3]"],
        ["[null,1]", "[null]", "[1,2,3]"],
    ),
    "anyOf": ({"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 2}]}, ["7", '"ab"'], ['"abc"', "null"]),
    "anyOf beside keywords": (
        {**PERSON, "required": [], "anyOf": [{"required": ["name"]}, {"required": ["age"]}]},
        ['{"name":"a"}', '{"age":1}', '{"name":"a","age":1}'],
        ["{}"],
    ),
    "discriminated": (
        {"oneOf": [thing(kind={"const": "a"}, x={"type": "null"}), thing(kind={"const": "b"}, y={"type": "null"})]},
        ['{"kind":"a","x":null}', '{"kind":"b","y":null}'],
        ['{"kind":"a","y":null}'],
    ),
    "allOf": (
        {"allOf": [PERSON, {"properties": {"id": {"type": "integer"}}, "required": ["id"]}]},
        ['{"name":"a","id":1}', '{"name":"a","age":2,"id":1}'],
        ['{"name":"a"}', '{"id":1}'],
    ),
    "allOf tightens": (
        {"allOf": [{"type": "number", "minimum": 3}, {"type": "integer", "maximum": 9}, {"minimum": 5}]},
        ["5", "9"],
        ["4", "10", "5.5"],
    ),
    "same property twice": (
        {"allOf": [{"properties": {"a": {"minLength": 1}}}, {"properties": {"a": {"type": "string", "maxLength": 2}}}]},
        ["{}", '{"a":"x"}'],
        ['{"a":""}', '{"a":"xyz"}', '{"a":1}'],
    ),
    "linked list": (
        {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
        ['{"value":1,"next":null}', '{"value":1,"next":{"value":2,"next":null}}'],
        ['{"value":1}', '{"value":1,"next":{}}'],
    ),
    "tree": (
        {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#"}}}, "required": ["kids"]},
        ['{"kids":[]}', '{"kids":[{"kids":[]},{"kids":[]}]}'],
        ["{}", '{"kids":[1]}'],
    ),
    "ref beside keywords": (
        {"$ref": "#/definitions/n", "maximum": 5, "definitions": {"n": {"type": "integer", "minimum": 3}}},
        ["3", "5"],
        ["2", "6"],
    ),
    "ref with escapes": ({"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": {"type": "null"}}}, ["null"], ["1"]),
    "pattern": (
        {"type": "string", "pattern": "^[A-Z]{3}-\\d{2,4}(x|yz)?$"},
        ['"ABC-12"', '"ABC-1234yz"'],
        ['"AB-12"', '"ABC-12y"'],
    ),
    "free pattern": ({"type": "string", "pattern": "b+"}, ['"abc"', '"b"', '"\\nbb\\""'], ['"ac"', '""']),
    "half anchored": ({"type": "string", "pattern": "^a|b$"}, ['"ax"', '"xb"'], ['"xa"', '"bx"']),
    "pattern with escapes": (
        {"type": "string", "pattern": '^[^"]\\\\["\\n]$'},
        ['"x\\\\\\""', '"x\\\\\\n"'],
        ['"\\"\\\\n"'],
    ),
    "pattern and length": ({"type": "string", "pattern": "^(?:ab){1,2}$", "maxLength": 4}, ['"ab"', '"abab"'], ['"a"']),
    "date": (
        {"type": "string", "format": "date"},
        ['"2024-02-29"', '"1999-12-31"'],
        ['"2023-02-29"', '"2024-13-01"', '"1900-02-29"'],
    ),
    "date-time": (
        {"type": "string", "format": "date-time"},
        ['"2024-01-31T23:59:59Z"', '"2024-01-31T00:00:00.5+01:30"'],
        ['"2024-01-31"'],
    ),
    "time": ({"type": "string", "format": "time"}, ['"10:20:30Z"'], ['"24:00:00Z"', '"10:20"']),
    "uuid": ({"type": "string", "format": "uuid"}, ['"123e4567-e89b-12d3-a456-426614174000"'], ['"123e4567"']),
    "email": ({"type": "string", "format": "email"}, ['"a.b+c@example-1.org"'], ['"a@"', '"@b"']),
    "ipv4": ({"type": "string", "format": "ipv4"}, ['"192.168.0.255"'], ['"256.0.0.1"', '"1.2.3"']),
    "ipv6": ({"type": "string", "format": "ipv6"}, ['"2001:db8:0:0:0:0:0:1"'], ['"1:2"']),
    "duration": (
        {"type": "string", "format": "duration"},
        ['"P1Y2M3DT4H"', '"PT5M"', '"P2W"'],
        ['"P"', '"PT"', '"P1YT"'],
    ),
    "unknown format": ({"type": "string", "format": "hair-colour"}, ['"red"'], ["1"]),
    "annotations": (
        {"$schema": "x", "$id": "y", "title": "t", "description": "d", "default": 1, "examples": [], "type": "null"},
        ["null"],
        ["1"],
    ),
    "implied types": ({"minLength": 1, "minimum": 2}, ['"a"', "2"], ['""', "1", "true"]),
    "odd keys": (thing(**{'a"b': {"type": "null"}, "é\n": {"type": "null"}}), ['{"a\\"b":null,"é\\n":null}'], ["{}"]),
    "long string": (
        {"type": "string", "minLength": 1200, "maxLength": 3500},
        [f'"{"x" * n}"' for n in (1200, 2000, 3500)],
        [f'"{"x" * n}"' for n in (1199, 3501)],
    ),
    "endless string": ({"type": "string", "maxLength": 10**9}, ['"abc"'], ["1"]),
    "recursion told apart by constants": (
        {
            "$ref": "#/$defs/expr",
            "$defs": {
                "kind": {"enum": ["add", "sub"]},
                "expr": {
                    "anyOf": [
                        thing(
                            kind={"$ref": "#/$defs/kind"}, left={"$ref": "#/$defs/expr"}, right={"$ref": "#/$defs/expr"}
                        ),
                        thing(kind={"const": "neg"}, of={"$ref": "#/$defs/expr"}),
                        thing(list={"type": "array", "items": {"$ref": "#/$defs/expr"}}),
                        {"type": "integer"},
                    ]
                },
            },
        },
        ["1", '{"kind":"neg","of":{"kind":"add","left":1,"right":{"list":[2]}}}'],
        ['{"kind":"neg","left":1}', '{"kind":"mul","left":1,"right":2}'],
    ),
    "object or list": (
        {"type": ["object", "array"], "items": {"type": "null"}, "properties": {}},
        ["{}", "[null]"],
        ["[1]", "1"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_schema(name: str, vocabulary: Vocabulary) -> None:
    schema, good, bad = CASES[name]
    grammar = vocabulary.grammar(schema_to_gbnf(schema))
    try:
        validator = Validator(schema, format_checker=Validator.FORMAT_CHECKER)
        for text in good:
            validator.validate(json.loads(text))  # the case itself is right
            assert grammar.accepts(text), text
        for text in bad:
            assert not grammar.accepts(text), text
        rng = random.Random(name)
        for _ in range(6):
            text = grammar.walk(rng, 12_000)
            validator.validate(json.loads(text))
    finally:
        grammar.close()


def test_any_object(vocabulary: Vocabulary) -> None:
    grammar = vocabulary.grammar(json_object_gbnf())
    assert grammar.accepts('{"a": [1, {"b": "c"}]}')
    assert not grammar.accepts("[]")
    rng = random.Random(1)
    assert all(isinstance(json.loads(grammar.walk(rng)), dict) for _ in range(20))
    grammar.close()


REFUSED: list[tuple[Any, str]] = [
    (False, "/"),
    (3, "/"),
    ({"properties": {"a": {"not": {}}}}, "/properties/a/not"),
    ({"properties": {"a/b": {"if": {}}}}, "/properties/a~1b/if"),
    ({"patternProperties": {"a": {}}}, "/patternProperties"),
    ({"type": "array", "uniqueItems": True}, "/uniqueItems"),
    ({"type": "number", "multipleOf": 0.5}, "/multipleOf"),
    ({"type": "array", "contains": {}}, "/contains"),
    ({"dependentRequired": {}}, "/dependentRequired"),
    ({"unevaluatedProperties": False}, "/unevaluatedProperties"),
    ({"type": "integer", "minimum": 5, "maximum": 4}, "/"),
    ({"type": "integer", "exclusiveMinimum": 4, "exclusiveMaximum": 5}, "/"),
    ({"type": "number", "minimum": 1, "exclusiveMaximum": 1}, "/"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "/minLength"),
    ({"type": "string", "minLength": -1}, "/minLength"),
    ({"type": "string", "minLength": 10**9}, "/"),
    ({"type": "array", "items": {"type": "string"}, "minItems": 5, "maxItems": 4}, "/minItems"),
    ({"type": "array", "prefixItems": [{}], "items": False, "minItems": 2}, "/minItems"),
    ({"type": "blob"}, "/type"),
    ({"enum": []}, "/enum"),
    ({"type": "string", "enum": [1]}, "/"),
    ({"enum": [float("nan")]}, "/"),
    ({"enum": ["\ud800"]}, "/"),
    ({"type": "string", "enum": ["a"], "pattern": "b"}, "/pattern"),
    ({"anyOf": []}, "/anyOf"),
    ({"allOf": [{"type": "string"}, {"type": "null"}]}, "/allOf/1/type"),
    ({"allOf": [{"const": 1}, {"const": True}]}, "/allOf/1/const"),
    ({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}, "/allOf/1/pattern"),
    ({"allOf": [{"type": "array", "uniqueItems": True}, {"uniqueItems": False}]}, "/allOf/1/uniqueItems"),
    ({"allOf": [{"type": "integer", "minimum": "1"}, {"minimum": 2}]}, "/allOf/1/minimum"),
    ({"required": ["a"], "additionalProperties": False}, "/required"),
    ({"required": True}, "/required"),
    ({"type": "object", "minProperties": 2}, "/minProperties"),
    ({"properties": {"a": {}, "b": {}}, "maxProperties": 1}, "/maxProperties"),
    ({"$ref": "#"}, "/"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]}}}, "/$defs/a"),
    ({"$ref": "#/a", "minimum": 1, "a": {"$ref": "#/a", "maximum": 2}}, "/"),
    ({"$ref": "#/nowhere"}, "/"),
    ({"properties": {"a": {"$ref": "http://example.org/s"}}}, "/properties/a"),
    ({"properties": {"a": {"$ref": "#anchor"}}}, "/properties/a"),
    ({"properties": {"a": {"type": "string", "pattern": "(?=x)"}}}, "/properties/a"),
    ({"type": "string", "pattern": "(a)\\1"}, "/"),
    ({"type": "string", "pattern": "\\bx"}, "/"),
    ({"type": "string", "pattern": "(a*)*"}, "/"),
    ({"type": "string", "pattern": "(a?){9}"}, "/"),
    ({"type": "string", "pattern": "^(a{1,900}){1,900}$"}, "/"),
    ({"type": "string", "pattern": "a{2,1}"}, "/"),
    ({"type": "string", "pattern": "x(^a)"}, "/"),
    ({"type": "string", "pattern": "a**"}, "/"),
    ({"type": "string", "pattern": "[z-a]"}, "/"),
    ({"type": "string", "pattern": "("}, "/"),
    ({"type": "string", "pattern": "a)"}, "/"),
    ({"type": "string", "pattern": "(" * 100 + ")" * 100}, "/"),
    ({"type": "string", "pattern": "\\"}, "/"),
    ({"type": "string", "pattern": "^a+$", "maxLength": 3}, "/"),
    ({"type": "string", "pattern": 3}, "/pattern"),
]


@pytest.mark.parametrize(("schema", "path"), REFUSED)
def test_what_cannot_be_expressed_is_refused_with_its_place(schema: Any, path: str) -> None:
    with pytest.raises(SchemaError) as caught:
        schema_to_gbnf(schema)
    assert (caught.value.path or "/") == path


def nested(depth: int) -> Any:
    schema: Any = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


BOMBS: dict[str, Any] = {
    "deep": nested(5000),
    "deep constant": {"const": json.loads("[" * 900 + "]" * 900)},
    "huge enum": {"enum": list(range(5000))},
    "long enum": {"enum": [str(n) * 200 for n in range(10**4, 10**4 + 1900)]},
    "product": {"allOf": [{"anyOf": [{"minimum": n}, {"maximum": n}, {"type": "null"}]} for n in range(40)]},
    "many properties": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(30_000)}},
    "repetitions": {
        "type": "object",
        "properties": {f"p{n}": {"type": "string", "maxLength": 900 + n} for n in range(500)},
    },
    "regex tower": {"type": "string", "pattern": "^" + "(" * 8 + "a" + "{1,999})" * 8 + "b{1,999}" * 400 + "$"},
    "ref fan-out": {
        "$ref": "#/$defs/a0",
        "$defs": {
            f"{name}{n}": {"allOf": [{"$ref": f"#/$defs/{other}{n + 1}", "minimum": n} for other in order]}
            for n in range(40)
            for name, order in (("a", "ab"), ("b", "ba"))
        }
        | {"a40": {"type": "integer"}, "b40": {"type": "number"}},
    },
    "ways that multiply": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/a"}, "maxItems": n} for n in (5, 6)]}},
    },
    "ways that multiply by refs": {
        "$ref": "#/$defs/a",
        "$defs": {
            "a": {"anyOf": [{"$ref": "#/$defs/b"}, {"$ref": "#/$defs/c"}, {"type": "null"}]},
            "b": {"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}}},
            "c": {"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}, "y": {"type": "null"}}},
        },
    },
    "ways that multiply without recursion": {
        "$ref": "#/$defs/l0",
        "$defs": {
            f"l{n}": {
                "anyOf": [{"type": "array", "items": {"$ref": f"#/$defs/l{n + 1}"}, "minItems": k} for k in (0, 1)]
            }
            for n in range(20)
        }
        | {"l20": {"type": "null"}},
    },
    "many optional properties": {"properties": {f"p{n}": {"type": "null"} for n in range(600)}},
    "many parts": {"allOf": [{"properties": {f"p{n}": {"type": "string"}}} for n in range(400)]},
    "alternatives with one large enum": {
        "anyOf": [
            {
                "type": "object",
                "properties": {"kind": {"$ref": "#/$defs/kind"}},
                "required": ["kind"],
                "minProperties": n,
            }
            for n in range(80)
        ],
        "$defs": {"kind": {"enum": [f"k{n}" for n in range(1999)]}},
    },
    "many digits": {"type": "number", "minimum": 1e-300},
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_hostile_schema_is_refused_quickly(name: str) -> None:
    with pytest.raises(SchemaError):
        schema_to_gbnf(BOMBS[name])


def test_large_bounds_stay_small(vocabulary: Vocabulary) -> None:
    text = {"type": "string", "maxLength": 900_000}
    gbnf = schema_to_gbnf(
        {"type": "array", "maxItems": 10**6, "items": {"type": "array", "maxItems": 9**6, "items": text}}
    )
    assert len(gbnf) < 200_000
    grammar = vocabulary.grammar(gbnf)
    assert grammar.accepts('[["a"],["b","c"]]')
    grammar.close()


def test_without_strict_objects_are_open(vocabulary: Vocabulary) -> None:
    grammar = vocabulary.grammar(schema_to_gbnf(PERSON, strict=False))
    assert grammar.accepts('{"name":"a","x":1}')
    assert not grammar.accepts('{"name":"a","age":"x"}')
    grammar.close()


def test_ref_chains_are_as_long_as_they_like(vocabulary: Vocabulary) -> None:
    defs = {f"n{n}": {"type": "array", "items": {"$ref": f"#/$defs/n{n + 1}"}} for n in range(500)}
    grammar = vocabulary.grammar(schema_to_gbnf({"$ref": "#/$defs/n0", "$defs": {**defs, "n500": {}}}))
    assert grammar.accepts("[[[]]]")
    grammar.close()


DECIMALS = st.decimals(min_value=-2000, max_value=2000, places=3).map(float)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.booleans(), st.booleans(), st.sampled_from(["number", "integer"]))
def test_numeric_bounds_are_exact(
    vocabulary: Vocabulary, data: st.DataObject, low_open: bool, high_open: bool, kind: str
) -> None:
    low, high = sorted((data.draw(DECIMALS), data.draw(DECIMALS)))
    schema = {
        "type": kind,
        "exclusiveMinimum" if low_open else "minimum": low,
        "exclusiveMaximum" if high_open else "maximum": high,
    }
    validator = Validator(schema)
    try:
        grammar = vocabulary.grammar(schema_to_gbnf(schema))
    except SchemaError:
        assert low == high or kind == "integer"
        assert not any(validator.is_valid(n) for n in range(int(low) - 1, int(high) + 2))
        return
    nearby = [low, high, low + 0.001, low - 0.001, high + 0.001, high - 0.001, (low + high) / 2, 0, data.draw(DECIMALS)]
    for value in map(Decimal, (f"{n:.3f}" for n in nearby)):
        for text in {f"{value}", f"{value.normalize():f}", f"{round(value)}"}:
            fits = kind == "number" or "." not in text
            fits = fits and validator.is_valid(json.loads(text)) and not (kind == "integer" and text.startswith("-0"))
            assert grammar.accepts(text) == fits or (text.startswith("-0") and Decimal(text) == 0), text
    grammar.close()


SCALARS = st.sampled_from(
    [
        {"type": "null"},
        {"type": "boolean"},
        {"type": "string"},
        {"type": "string", "maxLength": 3},
        {"type": "integer", "minimum": -7, "maximum": 1200},
        {"type": "number", "exclusiveMinimum": -2.5},
        {"enum": ["a", "ab", None, 3]},
        {"const": [1]},
        {"type": "string", "pattern": "^[a-c]{2}\\.\\w*$"},
        {},
    ]
)


def compound(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.sampled_from(["a", "ab", "b", 'q"', "é"])
    members = st.dictionaries(names, parts, max_size=4)
    objects = st.builds(
        lambda properties, needed, extra: {
            "type": "object",
            "properties": properties,
            "required": [name for name in properties if name in needed],
            "additionalProperties": extra,
        },
        members,
        st.sets(names),
        st.one_of(st.just(False), parts),
    )
    arrays = st.builds(
        lambda first, items, low, more: {
            "type": "array",
            **({"prefixItems": first} if first else {}),
            "items": items,
            "minItems": low,
            "maxItems": low + more,
        },
        st.lists(parts, max_size=3),
        parts,
        st.integers(0, 4),
        st.integers(0, 3),
    )
    unions = st.builds(lambda options: {"anyOf": options}, st.lists(parts, min_size=1, max_size=3))
    return st.one_of(objects, arrays, unions)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.recursive(SCALARS, compound, max_leaves=8), st.integers(0, 2**32))
def test_any_walk_through_any_schema_validates(vocabulary: Vocabulary, schema: Any, seed: int) -> None:
    grammar = vocabulary.grammar(schema_to_gbnf(schema))
    rng = random.Random(seed)
    for _ in range(2):
        Validator(schema).validate(json.loads(grammar.walk(rng, 8000)))
    grammar.close()


KEYWORDS = [
    "type",
    "items",
    "prefixItems",
    "additionalItems",
    "minItems",
    "maxItems",
    "properties",
    "required",
    "additionalProperties",
    "propertyNames",
    "minProperties",
    "maxProperties",
    "minLength",
    "maxLength",
    "pattern",
    "format",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "enum",
    "const",
    "anyOf",
    "oneOf",
    "allOf",
    "$ref",
    "$defs",
    "not",
    "uniqueItems",
    "multipleOf",
    "title",
]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.floats(),
    st.sampled_from(
        ["object", "array", "string", "integer", "number", "null", "#", "#/$defs/a", "#/items", "a", "^a+$"]
    ),
    st.text(max_size=3),
)


def junk(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    schemas = st.dictionaries(st.sampled_from(KEYWORDS), parts, max_size=4)
    return st.one_of(schemas, st.lists(parts, max_size=3), st.dictionaries(st.sampled_from("ab"), parts, max_size=2))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(KEYWORDS), st.recursive(VALUES, junk, max_leaves=12), max_size=5), st.booleans())
def test_any_json_gives_a_grammar_or_a_schema_error(vocabulary: Vocabulary, schema: Any, strict: bool) -> None:
    try:
        gbnf = schema_to_gbnf(schema, strict=strict)
    except SchemaError:
        return
    vocabulary.grammar(gbnf).close()
