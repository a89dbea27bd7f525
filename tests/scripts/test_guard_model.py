"""What the guard's classifier is trained on and measured on: folds, splits, made-up texts."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from guard_model.augment import augmented, surrounded, wrapped
from guard_model.data import (
    WRITTEN,
    Fold,
    Prompt,
    Template,
    load_prompts,
    load_readings,
    load_templates,
    load_written,
    make_folds,
    part_of,
)
from guard_model.splits import split

LONG = "A long and harmless text about gardens. " * 12


def prompts(source: str, kind: str, count: int, text: str = "question") -> list[Prompt]:
    unsafe = kind == "direct"
    return [Prompt(f"{text} {source} {n}", unsafe, kind, source, "en", f"{source}-{n}") for n in range(1, count + 1)]


@pytest.fixture(scope="module")
def rows() -> list[Prompt]:
    harmful = [*prompts("bad", "direct", 60), *prompts("worse", "direct", 40), *prompts("multijail", "direct", 100)]
    benign = [*prompts("code", "benign", 80, LONG), *prompts("chat", "benign", 60), *prompts("maths", "benign", 50)]
    return [*harmful, *benign, *prompts("near", "hard_negative", 100)]


@pytest.fixture(scope="module")
def templates() -> list[Template]:
    return [Template(f"Be {n}. {{prompt}} {{x}} {{prompt}}", f"set{n % 2}", f"set{n % 2}-{n}") for n in range(6)]


def test_files_are_read(tmp_path: Path) -> None:
    row = {
        "text": "a",
        "label": "unsafe",
        "kind": "direct",
        "source": "bad",
        "lang": "en",
        "id": "bad-1",
        "category": None,
    }
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    wrapper = {"template": "x {prompt}", "placeholder": True, "source": "set0", "id": "set0-1"}
    other = {"template": "no place", "placeholder": False, "source": "set0", "id": "set0-2"}
    (tmp_path / "jailbreak_templates.jsonl").write_text(json.dumps(wrapper) + "\n" + json.dumps(other) + "\n")
    assert load_prompts(tmp_path) == [Prompt("a", True, "direct", "bad", "en", "bad-1")]
    assert load_templates(tmp_path) == [Template("x {prompt}", "set0", "set0-1")]


def test_labels_are_read_again(tmp_path: Path) -> None:
    file = tmp_path / "readings.tsv"
    file.write_text("doubtful\tmultijail\tmultijail-0\nanswerable\tred_instruct\tred_instruct-2\n")
    assert load_readings(file) == {
        ("multijail", "multijail-0"): "doubtful",
        ("red_instruct", "red_instruct-2"): "answerable",
    }
    readings = load_readings()
    assert set(readings.values()) == {"answerable", "doubtful"}
    (source, name), *_ = [key for key in readings if key[0] == "aart"]
    rows = [
        {
            "text": each,
            "label": "unsafe",
            "kind": "direct",
            "source": source,
            "lang": "en",
            "id": each,
            "category": None,
        }
        for each in (name, "aart-new")
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [prompt.agreed for prompt in load_prompts(tmp_path)] == [False, True]


def test_what_readings_do_not_share_is_measured_and_not_trained_on(templates: list[Template]) -> None:
    mixed = [
        replace(prompt, agreed=number % 3 > 0)
        for source in ("bad", "worse")
        for number, prompt in enumerate(prompts(source, "direct", 300))
    ]
    found = split(mixed, templates, Fold(frozenset({"bad"}), frozenset({"set0"}), frozenset()))
    assert {prompt.source for prompt in found.train} == {"worse"}
    assert all(prompt.agreed for prompt in found.train)
    for name in ("direct", "jailbreak", "in_distribution"):
        assert {prompt.agreed for prompt in found.sets[name]} == {False, True}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text("safe\ten\t-\t7\tMy lock\nunsafe\ten\tcrime\t7\tHer lock\n")
    (tmp_path / "some.tsv").write_text("unsafe\tde\t-\t-\tEtwas\n")
    mine, hers, other = load_written(tmp_path)
    assert mine == Prompt("My lock", False, "benign", WRITTEN, "en", "written-pairs-1", frozenset(), "pairs-7")
    assert hers == Prompt("Her lock", True, "direct", WRITTEN, "en", "written-pairs-2", frozenset({"crime"}), "pairs-7")
    assert mine.family == hers.family
    assert (other.lang, other.family) == ("de", "written-some-1")


def test_what_was_written_is_sound_and_never_held_out(templates: list[Template]) -> None:
    found = load_written()
    assert len({prompt.text.casefold() for prompt in found}) == len(found)
    assert all(prompt.text == " ".join(prompt.text.split()) for prompt in found)
    for lang in {prompt.lang for prompt in found} - {"en"}:
        labels = [prompt.unsafe for prompt in found if prompt.lang == lang]
        assert sum(labels) == len(labels) / 2
    folds = make_folds([*found, *prompts("bad", "direct", 9), *prompts("good", "benign", 9)], templates)
    assert [(fold.harmful, fold.benign) for fold in folds] == [({"bad"}, {"good"})]


def test_versions_of_a_question_are_one_family() -> None:
    families = [prompt.family for prompt in prompts("multijail", "direct", 21)]
    assert [families.count(name) for name in dict.fromkeys(families)] == [10, 10, 1]
    assert len({prompt.family for prompt in prompts("bad", "direct", 21)}) == 21


def test_every_source_is_held_out(rows: list[Prompt], templates: list[Template]) -> None:
    folds = make_folds(rows, templates)
    assert sorted(name for fold in folds for name in fold.harmful) == ["bad", "multijail", "worse"]
    assert sorted(name for fold in folds for name in fold.benign) == ["chat", "code", "maths", "near"]
    assert {name for fold in folds for name in fold.templates} == {"set0", "set1"}
    assert make_folds(reversed(rows), templates) == folds


def test_nothing_stands_on_both_sides(rows: list[Prompt], templates: list[Template]) -> None:
    for fold in make_folds(rows, templates):
        found = split(rows, templates, fold)
        trained = {prompt.id for prompt in found.train}
        for name in ("direct", "benign", "hard_negative", "in_distribution"):
            assert trained.isdisjoint(prompt.id for prompt in found.sets[name])
        sources = {prompt.source for prompt in found.train}
        assert sources.isdisjoint(fold.harmful | fold.benign)
        assert fold.templates.isdisjoint(template.source for template in found.templates)
        assert {prompt.source for prompt in found.sets.get("jailbreak", [])} == fold.templates
        assert {prompt.source for prompt in found.sets.get("wrapped", [])} <= fold.templates
        assert all(prompt.unsafe for prompt in found.sets.get("jailbreak", []))
        assert not any(prompt.unsafe for prompt in found.sets.get("wrapped", []))
        families = {prompt.family for prompt in found.train}
        assert families.isdisjoint(prompt.family for prompt in found.sets["in_distribution"])


def test_a_set_takes_as_many_of_each_benign_source(rows: list[Prompt], templates: list[Template]) -> None:
    fold = Fold(frozenset({"bad"}), frozenset(), frozenset({"code", "chat"}))
    found = split(rows, templates, fold, most=20).sets
    assert sorted(prompt.source for prompt in found["benign"]) == ["chat"] * 10 + ["code"] * 10
    assert len(found["direct"]) == 20
    assert "jailbreak" not in found


def test_without_a_fold_only_the_in_distribution_split_is_left_out(
    rows: list[Prompt], templates: list[Template]
) -> None:
    found = split(rows, templates, None)
    assert len(found.train) + sum(part_of(prompt.family, 20) == 0 for prompt in rows) == len(rows)
    assert found.sets["in_distribution"]
    assert found.sets["direct"] == found.sets["benign"] == []


def test_a_question_stands_wherever_the_template_has_a_place_for_it(templates: list[Template]) -> None:
    question = prompts("bad", "direct", 1)[0]
    example = wrapped(question, templates[0])
    assert example.text == f"Be 0. {question.text} {{x}} {question.text}"
    assert example.focus is not None
    assert example.text[slice(*example.focus)] == question.text
    assert (example.unsafe, example.jailbreak, example.kind) == (True, True, "jailbreak")


def test_a_question_in_a_long_text_is_where_the_example_says() -> None:
    question, carrier, chance = prompts("bad", "direct", 1)[0], prompts("code", "benign", 1, LONG)[0], random.Random(1)
    places = set()
    for _ in range(60):
        example = surrounded(question, carrier, chance)
        assert example.focus is not None
        assert example.text[slice(*example.focus)] == question.text
        assert example.unsafe
        places.add((example.focus[0] == 0, example.focus[1] == len(example.text)))
    assert places == {(True, False), (False, True), (False, False)}


def test_wrappers_and_surroundings_say_nothing_about_the_label(rows: list[Prompt], templates: list[Template]) -> None:
    examples = augmented(rows, templates, wrapped_each=5, surrounded_each=1000, seed=3)
    assert len(examples) == len(rows) + 2 * 5 * len(templates) + 2000
    made = examples[len(rows) :]
    assert sum(example.unsafe for example in made) == len(made) / 2
    assert sum(example.unsafe for example in made if example.jailbreak) == 5 * len(templates)
    assert examples == augmented(rows, templates, wrapped_each=5, surrounded_each=1000, seed=3)
