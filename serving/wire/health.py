"""GET /health."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from serving.wire.common import ResponseModel


class Health(ResponseModel):
    status: Literal["ok", "loading", "shutting_down"]
    version: str | None = Field(default=None, description="edgellm's version.")
    models_loaded: list[str] | None = Field(default=None, description="Models in memory.")
