"""Embeddings: a context of its own, a little work each step, so that running streams keep moving.

Token states are pooled here rather than in llama.cpp, which pools only within one batch: so any length up to the
context works for causal models. Models that attend both ways need a whole text in one batch, and get it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgellm.backend.batch import Batch
from edgellm.backend.context import Context
from edgellm.errors import BackendError, EdgeLLMError

Pooling = Literal["mean", "cls", "last"]
Vectors = list[npt.NDArray[np.float32]]


@dataclass(slots=True, eq=False)
class EmbeddingJob:
    """Texts to embed, and who wants them. `done` is called once, on the engine thread."""

    inputs: Sequence[Sequence[int]]
    done: Callable[[Vectors | EdgeLLMError], None]
    vectors: Vectors = field(default_factory=list)
    cancelled: bool = False


class Embedder:
    """Embeds token sequences with `context`, made with `embeddings=True`."""

    def __init__(self, context: Context, pooling: Pooling) -> None:
        self.context = context
        self._pooling = pooling
        self._batch = Batch(context.params.batch_tokens)
        self._jobs: deque[EmbeddingJob] = deque()
        self._read = 0  # tokens of the current text that are done
        self._sum = np.zeros(context.embedding_width, np.float64)
        self.tokens = 0

    @property
    def max_tokens(self) -> int:
        """Longest text, in tokens."""
        return self.context.context_tokens

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._jobs)

    def submit(self, job: EmbeddingJob) -> None:
        """Queues a job."""
        self._jobs.append(job)

    def step(self) -> None:
        """Computes one batch: part of a text, or one whole text."""
        job = self._jobs[0]
        if job.cancelled:
            self._jobs.popleft()
            self._restart()
            return
        text = job.inputs[len(job.vectors)]
        part = text[self._read : self._read + self._batch.capacity]
        self._batch.clear()
        self._batch.extend(part, self._read, 0, outputs=len(part))
        try:
            self.context.decode(self._batch)
        except BackendError as error:
            self._jobs.popleft()
            self._restart()
            job.done(error)
            return
        self._pool(len(part))
        self._read += len(part)
        self.tokens += len(part)
        if self._read == len(text):
            job.vectors.append(self._result())
            self._restart()
            if len(job.vectors) == len(job.inputs):
                self._jobs.popleft()
                job.done(job.vectors)

    def fail_all(self, error: EdgeLLMError) -> None:
        """Ends every job with `error`."""
        while self._jobs:
            job = self._jobs.popleft()
            if not job.cancelled:
                job.done(error)
        self._restart()

    def close(self) -> None:
        """Frees the context."""
        self.context.close()

    def _pool(self, count: int) -> None:
        if self._pooling == "mean":
            for row in range(count):
                self._sum += self.context.embedding(row)
        elif self._pooling == "last":
            self._sum[:] = self.context.embedding(count - 1)
        elif self._read == 0:
            self._sum[:] = self.context.embedding(0)

    def _result(self) -> npt.NDArray[np.float32]:
        norm = float(np.linalg.norm(self._sum))
        return (self._sum / norm if norm else self._sum).astype(np.float32)

    def _restart(self) -> None:
        self._read = 0
        self._sum = np.zeros_like(self._sum)
        self.context.clear()
