"""/v1/adapters: list, load and unload LoRA adapters. Ours; OpenAI has no such endpoint."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from serving.wire.common import NULL_IS_DEFAULT, RequestModel, ResponseModel, Text

AdapterName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,127}$")]


class AdapterLoadRequest(RequestModel):
    name: AdapterName = Field(description="Name that requests will use.")
    path: Annotated[Text, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")] | None = Field(
        default=None, description="A GGUF adapter file on the server. Default: the stored adapter of that name."
    )
    scale: Annotated[float, Field(ge=-100, le=100), NULL_IS_DEFAULT] = Field(
        default=1.0, description="Strength that a request's own scale is multiplied with."
    )
    model: Text | None = Field(
        default=None, max_length=512, description="Model it belongs to. Default: the default model."
    )


class Adapter(ResponseModel):
    id: str = Field(description="Its name.")
    object: Literal["adapter"] = "adapter"
    model: str
    scale: float
    size_bytes: int | None = None
    created: int | None = Field(default=None, description="When it was loaded, in Unix seconds.")


class AdapterList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[Adapter]


class AdapterUnloaded(ResponseModel):
    id: str
    object: Literal["adapter"] = "adapter"
    deleted: Literal[True] = True
