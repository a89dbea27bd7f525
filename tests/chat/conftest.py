from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chat.grammars import Vocabulary


@pytest.fixture(scope="session")
def vocabulary() -> Iterator[Vocabulary]:
    vocabulary = Vocabulary()
    yield vocabulary
    vocabulary.close()
