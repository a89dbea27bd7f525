"""DELETE /v1/drafts. Ours; OpenAI has no such endpoint."""

from __future__ import annotations

from typing import Literal

from serving.wire.common import ResponseModel


class DraftsForgotten(ResponseModel):
    object: Literal["drafts"] = "drafts"
    deleted: Literal[True] = True
