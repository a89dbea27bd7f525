"""What a target held likely, against its logits computed in one go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgellm.backend.model import Model  # noqa: E402
from edgellm.speculative.buffer import Record  # noqa: E402
from edgellm.tune.teacher import Likeliest, Teacher, longest_of  # noqa: E402
from tests.support.tiny_gguf import write_tiny_llama  # noqa: E402
from tests.tune.rig import TEXT, true_logits  # noqa: E402

LONG = [*TEXT, *TEXT[::-1], *TEXT, *TEXT[5:70]]


def likeliest_of(path: Path, records: list[Record], top: int) -> list[Likeliest]:
    model = Model(path)
    with Teacher(model, longest=longest_of(records), threads=1, top=top) as teacher:
        found = [teacher.likeliest(record) for record in records]
    model.close()
    return found


@pytest.mark.parametrize("prompt", [0, 1, 7, 126, 127, 128, 129, 200, 255, 256])
def test_every_token_of_the_answer(tmp_path: Path, prompt: int) -> None:
    base = write_tiny_llama(tmp_path / "m.gguf")
    records = [Record(tuple(LONG[:prompt]), tuple(LONG[prompt:])), Record(tuple(TEXT[:9]), (TEXT[9],))]
    (tokens, found), (others, of_others) = likeliest_of(base, records, 5)
    assert tokens.shape == found.shape == (len(LONG) - prompt, 5)
    expected = true_logits(base, LONG).softmax(1)[:-1].topk(5)  # of what follows each token
    if prompt == 0:  # nothing precedes it
        assert (found[0] == 0).all()
        tokens, found = tokens[1:], found[1:]
    expected = [part[max(0, prompt - 1) :].numpy() for part in expected]
    assert np.allclose(found, expected[0], atol=2e-3)
    assert (tokens[:, 0] == expected[1][:, 0]).mean() > 0.97  # ties may be told apart otherwise
    alone = true_logits(base, list(TEXT[:9])).softmax(1)[-1].topk(5)
    assert np.allclose(of_others[0], alone.values.numpy(), atol=2e-3)
    assert others[0, 0] == int(alone.indices[0])


def test_probabilities_are_sorted_and_of_one_whole(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "m.gguf")
    ((tokens, found),) = likeliest_of(base, [Record(tuple(TEXT[:9]), tuple(TEXT[9:40]))], 10**6)
    assert tokens.shape[1] > 256  # all of them
    assert np.allclose(found.sum(1), 1, atol=1e-4)
    assert (np.diff(found) <= 0).all()
    assert all(len(set(row)) == tokens.shape[1] for row in tokens.tolist())
