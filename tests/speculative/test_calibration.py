"""Which widths of step are timed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgellm.backend.context import Context
from edgellm.backend.model import Model
from edgellm.speculative.calibration import measure_steps
from edgellm.speculative.drafter import SEQUENCES, drafter_context
from tests.support.tiny_gguf import write_tiny_llama


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    model = Model(write_tiny_llama(tmp_path / "model.gguf"))
    found = drafter_context(model, threads=1)
    yield found
    found.close()
    model.close()


def test_a_target_is_timed_with_logits_of_every_row(context: Context) -> None:
    assert list(measure_steps(context, 1e9)) == [1, 2, SEQUENCES]  # it has outputs for no more


def test_a_drafter_is_timed_as_it_reads_with_logits_of_the_last_row(context: Context) -> None:
    found = measure_steps(context, 1e9, every_row=False)
    assert list(found) == [1, 2, 4, 8, 16, 64]
    assert all(seconds > 0 for seconds in found.values())


def test_one_row_is_timed_however_little_time_there_is(context: Context) -> None:
    assert list(measure_steps(context, 0.0)) == [1]
