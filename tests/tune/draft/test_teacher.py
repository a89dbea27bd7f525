"""What else a target might have written, in drafter tokens, and what a drafter learns of it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgellm.backend.model import load_packed  # noqa: E402
from edgellm.speculative.bridge import Bridge  # noqa: E402
from edgellm.speculative.ngram_cache import NgramCache  # noqa: E402
from edgellm.tune.draft.distil import Course, Distiller  # noqa: E402
from edgellm.tune.draft.net import Net  # noqa: E402
from edgellm.tune.draft.samples import Row, Sample, Soft, make_sample  # noqa: E402
from edgellm.tune.draft.teacher import as_record, soften  # noqa: E402
from edgellm.tune.prefix_tree import pack  # noqa: E402
from edgellm.tune.teacher import Likeliest, Teacher  # noqa: E402
from tests.support.texts import PASSAGES  # noqa: E402
from tests.support.tiny_gguf import write_tiny_llama  # noqa: E402
from tests.support.vocabularies import vocabulary  # noqa: E402
from tests.tune.rig import TEXT, true_logits  # noqa: E402


@pytest.fixture(scope="module")
def bridge() -> Bridge:
    return Bridge(vocabulary("smol"), vocabulary("qwen"), NgramCache())


@pytest.mark.parametrize(("prompt", "answer"), [(5, 40), (300, 40), (200, 290), (1, 1), (250, 300)])
def test_the_tops_are_those_of_one_pass(tmp_path: Path, prompt: int, answer: int) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", context=1024)
    tokens = [TEXT[number % len(TEXT)] for number in range(prompt + answer)]
    row = Row(tokens[:prompt], tokens[prompt:])
    with closing(load_packed(path)) as model, Teacher(model, longest=640, threads=1, top=12) as teacher:
        for _ in range(2):  # the second time nothing of the first is left
            found = teacher.likeliest(as_record(row))
    shown = tokens[:512]
    expected = true_logits(path, shown).softmax(1)[prompt - 1 : prompt - 1 + answer]
    assert len(found[0]) == answer
    for others, shares, wanted in zip(*found, expected, strict=False):
        assert shares[0] == pytest.approx(float(wanted.max()), abs=0.02)
        assert all(s == pytest.approx(float(wanted[int(t)]), abs=0.02) for t, s in zip(others, shares, strict=True))


def test_a_prompt_that_is_too_long_is_read_from_its_end() -> None:
    record = as_record(Row([64] * 2000 + [65] * 2038, [66] * 10))
    assert record.prompt == (65,) * 2038
    assert record.answer == (66,) * 10


def _likeliest(*places: list[tuple[int, float]]) -> Likeliest:
    """As arrays; places with fewer tokens are filled up with what has no probability."""
    most = max(map(len, places), default=0)
    filled = [[*place, *[(0, 0.0)] * (most - len(place))] for place in places]
    tokens = np.array([[token for token, _ in place] for place in filled], np.int32)
    return tokens, np.array([[share for _, share in place] for place in filled], np.float32)


def _certain(tokens: list[int]) -> Likeliest:
    return _likeliest(*([(token, 1.0)] for token in tokens))


@pytest.mark.parametrize("text", PASSAGES)
def test_what_was_written_is_the_drafters_own_token(bridge: Bridge, text: str) -> None:
    target = bridge.target.vocab
    answer = target.tokenize(text, add_special=False, parse_special=False)
    row = Row(target.tokenize("<|im_start|>assistant\n", add_special=False, parse_special=True), answer)
    sample = make_sample(bridge, row.prompt, row.answer)
    assert sample is not None
    soft = soften(bridge, row, sample, _certain(answer)).soft
    if soft is None:  # the drafter's vocabulary cannot spell it
        assert bridge.drafter.spell(text.encode()) is None
        return
    assert len(soft.places) > len(answer) / 2
    assert soft.places == sorted(set(soft.places))
    for place, tokens, shares in zip(soft.places, soft.tokens, soft.shares, strict=True):
        assert (tokens, shares) == ([sample.tokens[place]], [1.0])


def test_other_tokens_share_what_they_begin_with(bridge: Bridge) -> None:
    target, drafter = bridge.target, bridge.drafter
    row = Row([target.find(b"\n")], [target.find(b" the"), target.find(b" cat")])
    sample = make_sample(bridge, row.prompt, row.answer)
    assert sample is not None
    dog, end = target.find(b" dog"), target.vocab.eos
    tops = [[(row.answer[0], 0.9), (dog, 0.1)], [(row.answer[1], 0.5), (dog, 0.3), (end, 0.2)]]
    soft = soften(bridge, row, sample, _likeliest(*tops)).soft
    assert soft is not None
    assert soft.tokens[1] == [drafter.find(b" cat"), drafter.find(b" dog")]
    assert soft.shares == [pytest.approx([0.9, 0.1]), pytest.approx([0.625, 0.375])]  # an end is no text
    assert soften(bridge, row, sample, _likeliest(*tops[:1])) is sample


def test_a_drafter_learns_the_shares(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", seed=1)
    tokens = [*b"say it: hello"]
    soft = Soft([9], [[ord("e"), ord("o")]], [[0.25, 0.75]])
    course = Course(epochs=150, learning_rate=3e-3, softness=1.0)
    distiller = Distiller(Net(path), [Sample(tokens, 8, soft)], [], course)
    for _ in range(course.epochs):
        distiller._step([Sample(tokens, 8, soft)], 0.5)
    with torch.no_grad():
        found = distiller.net.logits(pack([tokens]), torch.tensor([8, 9])).softmax(1)
    assert float(found[0, ord("o")]) == pytest.approx(0.75, abs=0.05)
    assert float(found[0, ord("e")]) == pytest.approx(0.25, abs=0.05)
    assert float(found[1, ord("l")]) > 0.9  # where nothing is soft, what was written counts
