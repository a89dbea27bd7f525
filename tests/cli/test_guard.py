"""`edgellm guard` as a process, and what its evaluation counts. What is unsafe is decided by rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guards.measures import Share
from serving.cli.guard_eval import Row, evaluate, parse_rows
from tests.serving.server import run_edgellm

WORD = "zorkmid"
RULES = ("--block", WORD, "--allow", "re:.+")  # the classifier gets nothing to read
BAD, GOOD = f"Tell me about the {WORD}.", "Tell me about bread."


def row(text: str, label: str, **more: str) -> str:
    return json.dumps({"text": text, "label": label, **more})


ROWS = [
    row(GOOD, "safe", kind="plain", source="[a]"),
    row(BAD, "unsafe", kind="plain", source="b", note="ignored"),
    "",
    row(GOOD, "unsafe", kind="sly"),
    row("line\u2028separator", "safe"),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(ROWS) + "\n")
    return path


def test_the_status_tells_the_verdict(tmp_path):
    done = run_edgellm(tmp_path, "guard", "check", GOOD, *RULES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["label", "safe"]
    done = run_edgellm(tmp_path, "guard", "check", BAD, *RULES)
    assert done.returncode == 1
    facts = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert (facts["label"], facts["rule"], facts["window"]) == ("unsafe", WORD, BAD)
    assert list(facts) == ["label", "score", "jailbreak", "rule", "window", "time"]
    assert done.stderr == ""


def test_a_text_from_standard_input_as_json(tmp_path):
    done = run_edgellm(tmp_path, "guard", "check", "-", "--json", "--level", "strict", *RULES, stdin=f"{BAD}\nÄh?\n")
    assert done.returncode == 1, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["label"], facts["level"], facts["rule"]) == ("unsafe", "strict", WORD)
    assert facts["window"]["text"] == f"{BAD} Äh?"


def test_the_classifier_is_asked_where_no_rule_decides(tmp_path):
    done = run_edgellm(tmp_path, "guard", "check", "How do I bake bread?", "--json")
    facts = json.loads(done.stdout)
    assert 0 < facts["score"] < 1
    assert done.returncode == (1 if facts["label"] == "unsafe" else 0)
    assert len(facts["categories"]) == 11


def test_what_is_not_given_comes_from_the_settings(tmp_path):
    done = run_edgellm(tmp_path, "guard", "check", BAD, env={"EDGELLM_GUARD_BLOCK": f"x\n{WORD}"})
    assert done.returncode == 1, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("check",),
        ("check", GOOD, "--block", "re:("),
        ("check", GOOD, "--level", "0.5"),
        ("check", GOOD, "--colour", "red"),
        ("eval",),
        ("eval", "none-such.jsonl"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_judged_is_2(tmp_path, arguments):
    done = run_edgellm(tmp_path, "guard", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr
    assert "Traceback" not in done.stderr


def test_the_table_of_an_evaluation(tmp_path, file):
    done = run_edgellm(tmp_path, "guard", "eval", str(file), *RULES)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[1] == f"all 4 1 {Share(1, 4)}"
    assert f"label safe 2 0 {Share(0, 2)}" in lines
    assert f"label unsafe 2 1 {Share(1, 2)}" in lines
    assert f"source [a] 1 0 {Share(0, 1)}" in lines
    assert lines[-1].startswith(f"accuracy {Share(3, 4)}: 3 of 4")


def test_an_evaluation_as_json(tmp_path, file):
    done = run_edgellm(tmp_path, "guard", "eval", str(file), "--json", *RULES)
    facts = json.loads(done.stdout)
    assert facts["level"] == "balanced"
    low, high = Share(1, 4).interval
    assert facts["flagged"] == {"count": 1, "of": 4, "share": 0.25, "low": low, "high": high}
    assert facts["accuracy"]["count"] == 3
    assert {name: each["of"] for name, each in facts["kind"].items()} == {"plain": 2, "sly": 1}
    assert set(facts["source"]) == {"[a]", "b"}


def test_faults_are_told_with_their_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    faulty = ["{", "[1]", '{"label": "safe"}', row("a", "maybe"), '{"text": "a", "label": "safe", "kind": 1}']
    path.write_text("\n".join([row(GOOD, "safe"), *faulty, *["5"] * 30]))
    done = run_edgellm(tmp_path, "guard", "eval", str(path))
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert [int(line.split("line ")[1].split(":")[0]) for line in lines[:-1]] == list(range(2, 22))
    assert "not JSON" in lines[0]
    assert "15 more" in lines[-1]


def test_a_file_without_rows_is_told(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n\n")
    done = run_edgellm(tmp_path, "guard", "eval", str(tmp_path / "rows.jsonl"))
    assert done.returncode == 2
    assert "no rows" in done.stderr


def test_what_is_counted():
    rows = [Row("a", "safe", "x"), Row("b", "unsafe", "x"), Row("c", "unsafe", "y", "s"), Row("d", "safe")]
    found = evaluate(rows, [True, True, False, False])
    assert (found.flagged, found.right) == (Share(2, 4), Share(2, 4))
    assert found.groups["label"] == {"safe": Share(1, 2), "unsafe": Share(1, 2)}
    assert found.groups["kind"] == {"x": Share(2, 2), "y": Share(0, 1)}
    assert found.groups["source"] == {"s": Share(0, 1)}


@given(st.lists(st.text(st.characters(codec="utf-8")) | st.sampled_from(ROWS), max_size=8))
def test_every_line_is_a_row_a_fault_or_empty(lines: list[str]) -> None:
    text = "\n".join(lines)
    rows, faults = parse_rows(text)
    assert len(rows) + len(faults) == sum(bool(line.strip()) for line in text.split("\n"))


@pytest.mark.parametrize("name", ["text", "kind", "source"])
def test_lone_surrogates_are_a_fault(name):
    rows, faults = parse_rows(json.dumps({"text": "a", "label": "safe", name: "\ud800"}))
    assert (rows, faults) == ([], [(1, f"{name} is not valid Unicode")])


def test_rows_nested_too_deeply_are_a_fault():
    rows, faults = parse_rows("[" * 100_000)
    assert (rows, [line for line, _ in faults]) == ([], [1])
