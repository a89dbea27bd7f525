"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import contextlib

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from edgellm.engine.embedder import Embedder, EmbeddingJob, Vectors
from edgellm.errors import EdgeLLMError, RequestError
from serving.service import Leased, Service
from serving.streaming import run_until_disconnect
from serving.wire.embeddings import Embedding, EmbeddingRequest, EmbeddingResponse, EmbeddingUsage, encode_embedding

router = APIRouter()


async def _embed(service: Service, request: EmbeddingRequest) -> EmbeddingResponse:
    async with service.lease(request.model) as leased:
        leased.arrival.over()
        if leased.adapters:
            raise RequestError("Embeddings are made by the base model: name it instead of the adapter", "model")
        embedder = await asyncio.to_thread(service.models.embedder, leased.loaded)
        inputs = [await _tokens(service, leased, embedder, text) for text in request.inputs]
        width = embedder.context.embedding_width
        if request.dimensions is not None and request.dimensions > width:
            raise RequestError(f"The model's embeddings have {width} dimensions", "dimensions")
        async with service.in_time(None, None):
            vectors = await _run(service, embedder, inputs)
        count = sum(map(len, inputs))
        data = [
            Embedding(index=index, embedding=encode_embedding(vector.tolist(), request.encoding_format))
            for index, vector in enumerate(_shortened(vectors, request.dimensions))
        ]
        usage = EmbeddingUsage(prompt_tokens=count, total_tokens=count)
        return EmbeddingResponse(data=data, model=leased.loaded.name, usage=usage)


async def _tokens(service: Service, leased: Leased, embedder: Embedder, text: str | tuple[int, ...]) -> tuple[int, ...]:
    loaded, limit = leased.loaded, embedder.max_tokens
    if isinstance(text, str):
        tokens = await service.tokenize(loaded, text, limit=limit, param="input")
        if not tokens:
            raise RequestError("The text has no tokens", "input")
        return tokens
    return service.check_tokens(loaded, text, limit=limit, param="input")


async def _run(service: Service, embedder: Embedder, inputs: list[tuple[int, ...]]) -> Vectors:
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Vectors] = loop.create_future()

    def settle(outcome: Vectors | EdgeLLMError) -> None:
        if result.done():
            return
        if isinstance(outcome, EdgeLLMError):
            result.set_exception(outcome)
        else:
            result.set_result(outcome)

    def done(outcome: Vectors | EdgeLLMError) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(settle, outcome)

    job = EmbeddingJob(inputs, done)
    service.engine.embed(embedder, job)
    try:
        return await result
    finally:
        job.cancelled = True


def _shortened(vectors: Vectors, dimensions: int | None) -> Vectors:
    """The leading dimensions, scaled to length 1 again, as OpenAI does it."""
    if dimensions is None:
        return vectors
    cut = [vector[:dimensions] for vector in vectors]
    return [vector / (float(np.linalg.norm(vector)) or 1.0) for vector in cut]


@router.post("/v1/embeddings", response_model=EmbeddingResponse, summary="Embed texts")
async def embeddings(body: EmbeddingRequest, http: Request) -> Response:
    """Vectors of length 1: pooled as the model says, or the mean over the tokens where it says nothing."""
    answer = await run_until_disconnect(http, _embed(http.app.state.service, body))
    return Response(answer.to_json(), media_type="application/json")
