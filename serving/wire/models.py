"""GET /v1/models and /v1/models/{id}. Fields beyond OpenAI's are extensions, left out where unknown."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from serving.wire.common import ResponseModel


class Model(ResponseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When the file was last changed, in Unix seconds.")
    owned_by: str
    loaded: bool | None = Field(default=None, description="Extension. Whether it is in memory now.")
    context_tokens: int | None = Field(
        default=None, description="Extension. Tokens that prompt and answer may have together."
    )
    size_bytes: int | None = Field(default=None, description="Extension. Size of the model file.")


class ModelList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ModelDeleted(ResponseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: bool
