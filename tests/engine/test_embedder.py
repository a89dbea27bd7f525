"""Embeddings against a plain computation with one context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from edgellm.backend.batch import Batch
from edgellm.backend.context import Context, ContextParams
from edgellm.backend.model import Model
from edgellm.engine.embedder import Embedder, EmbeddingJob, Pooling, Vectors
from edgellm.errors import BackendError, EdgeLLMError, ShuttingDownError

TEXTS = [list(b"hello world"), [70], list(range(60, 120)), list(b"hello world")]


@contextmanager
def _embedder(path: Path, pooling: Pooling, batch_tokens: int) -> Iterator[Embedder]:
    model = Model(path)
    params = ContextParams(
        context_tokens=256, sequences=1, batch_tokens=batch_tokens, outputs=batch_tokens, threads=1, embeddings=True
    )
    embedder = Embedder(Context(model, params), pooling)
    try:
        yield embedder
    finally:
        embedder.close()
        model.close()


def _states(path: Path, text: Sequence[int]) -> np.ndarray:
    """Final hidden states, (tokens, width), from one batch."""
    with _embedder(path, "mean", 256) as plain:
        batch = Batch(256)
        batch.extend(text, 0, 0, outputs=len(text))
        plain.context.decode(batch)
        return np.array([plain.context.embedding(row).copy() for row in range(len(text))])


def _expected(path: Path, text: Sequence[int], pooling: Pooling) -> np.ndarray:
    states = _states(path, text)
    vector = {"mean": states.mean(axis=0), "cls": states[0], "last": states[-1]}[pooling]
    return vector / np.linalg.norm(vector)


def _run(embedder: Embedder, texts: Sequence[Sequence[int]]) -> Vectors | EdgeLLMError:
    results: list[Vectors | EdgeLLMError] = []
    embedder.submit(EmbeddingJob(texts, results.append))
    while embedder.has_work:
        embedder.step()
    (result,) = results
    return result


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("batch_tokens", [16, 256])
def test_a_decoder_in_chunks_or_whole(llama: Path, pooling: Pooling, batch_tokens: int) -> None:
    with _embedder(llama, pooling, batch_tokens) as embedder:
        vectors = _run(embedder, TEXTS)
        assert embedder.tokens == sum(map(len, TEXTS))
    assert isinstance(vectors, list)
    for text, vector in zip(TEXTS, vectors, strict=True):
        assert vector.dtype == np.float32
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
        assert vector == pytest.approx(_expected(llama, text, pooling), abs=2e-3)
    assert vectors[0] == pytest.approx(vectors[3], abs=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_encoder(bert: Path, pooling: Pooling) -> None:
    texts = [[2, 40, 41, 3], [2, *range(20, 80), 3]]
    with _embedder(bert, pooling, 128) as embedder:
        vectors = _run(embedder, texts)
    assert isinstance(vectors, list)
    for text, vector in zip(texts, vectors, strict=True):
        assert vector == pytest.approx(_expected(bert, text, pooling), abs=1e-4)


def test_jobs_take_turns_and_a_cancelled_one_is_skipped(llama: Path) -> None:
    done: list[int] = []
    with _embedder(llama, "mean", 16) as embedder:
        jobs = [EmbeddingJob(TEXTS, lambda _result, n=n: done.append(n)) for n in range(3)]  # type: ignore[misc]
        for job in jobs:
            embedder.submit(job)
        embedder.step()
        jobs[0].cancelled = True  # in the middle
        while embedder.has_work:
            embedder.step()
        assert done == [1, 2]
        vectors = _run(embedder, TEXTS[:1])
    assert isinstance(vectors, list)
    assert vectors[0] == pytest.approx(_expected(llama, TEXTS[0], "mean"), abs=2e-3)


def test_a_failure_ends_its_job_only(llama: Path) -> None:
    with _embedder(llama, "mean", 64) as embedder:
        assert isinstance(_run(embedder, [[1, 2], [10**6]]), BackendError)
        vectors = _run(embedder, TEXTS)
        assert isinstance(vectors, list)
        assert len(vectors) == len(TEXTS)


def test_fail_all(llama: Path) -> None:
    results: list[Vectors | EdgeLLMError] = []
    with _embedder(llama, "mean", 64) as embedder:
        embedder.submit(EmbeddingJob(TEXTS, results.append))
        embedder.submit(EmbeddingJob(TEXTS, results.append, cancelled=True))
        embedder.fail_all(ShuttingDownError("bye"))
        assert not embedder.has_work
    assert [str(result) for result in results] == ["bye"]
