"""The ASGI application."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.types import ASGIApp

from edgellm import __version__
from serving import errors, security
from serving.metrics import CountRequests
from serving.routes import (
    adapters,
    chat,
    completions,
    drafts,
    embeddings,
    files,
    fine_tuning,
    models,
    moderations,
    operations,
)
from serving.service import Service

_DESCRIPTION = "Quantised small language models behind an OpenAI-compatible API. Extensions are marked as such."


def create_api(service: Service) -> FastAPI:
    """The routes alone, without the guards around them."""
    api = FastAPI(title="edgellm", version=__version__, description=_DESCRIPTION, responses=errors.ERROR_RESPONSES)
    api.state.service = service
    errors.install(api)
    generating = (chat, completions, embeddings, moderations)
    for module in (*generating, models, adapters, drafts, files, fine_tuning, operations):
        api.include_router(module.router)
    return api


def create_app(service: Service) -> ASGIApp:
    """Everything, as it is served. Raises ConfigError if the API key file is faulty."""
    return CountRequests(security.wrap(create_api(service), service.settings), service.metrics)
