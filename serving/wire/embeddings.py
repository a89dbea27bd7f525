"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from serving.wire.common import NULL_IS_DEFAULT, RequestModel, ResponseModel, Text
from serving.wire.inputs import Inputs, as_inputs

DIMENSIONS_MAX = 1 << 16
Encoding = Literal["float", "base64"]


class EmbeddingRequest(RequestModel):
    input: Inputs = Field(description="What to embed: texts, or token ids.")
    model: Text | None = Field(
        default=None, max_length=512, description="Model to use. Default: the server's default model."
    )
    encoding_format: Annotated[Encoding, NULL_IS_DEFAULT] = Field(
        default="float", description="base64 is little-endian 32-bit floats; the openai client asks for it."
    )
    dimensions: int | None = Field(
        default=None, ge=1, le=DIMENSIONS_MAX, description="Keep this many leading dimensions. Default: all."
    )
    user: str | None = Field(default=None, description="Accepted and ignored.")

    @property
    def inputs(self) -> tuple[str | tuple[int, ...], ...]:
        """The inputs one by one: texts or token ids."""
        return as_inputs(self.input)


def encode_embedding(vector: Iterable[float], encoding: Encoding) -> list[float] | str:
    """A vector as the wire has it: a list of numbers, or base64 of little-endian 32-bit floats."""
    if encoding == "float":
        return [float(value) for value in vector]
    packed = array("f", vector)
    if sys.byteorder == "big":
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode("ascii")


class Embedding(ResponseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(ResponseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(ResponseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
