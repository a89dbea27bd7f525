"""/v1/adapters: list, load and unload LoRA adapters."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from edgellm.engine.manager import AdapterRecord
from edgellm.errors import AdapterError, InvalidModelFileError
from edgellm.models.store import AdapterStore
from serving.service import Service
from serving.wire.adapters import Adapter, AdapterList, AdapterLoadRequest, AdapterUnloaded

router = APIRouter()


def _wire(record: AdapterRecord) -> Adapter:
    return Adapter(
        id=record.name,
        model=record.model,
        scale=record.scale,
        size_bytes=record.path.stat().st_size if record.path.is_file() else None,
        created=record.created,
    )


@router.get("/v1/adapters", response_model=AdapterList, summary="List the loaded adapters")
def list_adapters(http: Request) -> Response:
    """Those that requests may name, in `adapter`, `adapters` or `model`."""
    service: Service = http.app.state.service
    body = AdapterList(data=[_wire(record) for record in service.models.adapters()])
    return Response(body.to_json(), media_type="application/json")


@router.post("/v1/adapters", response_model=Adapter, summary="Load an adapter")
def load_adapter(body: AdapterLoadRequest, http: Request) -> Response:
    """Takes the file at `path` on the server, or the stored adapter of that name. One of the same name is replaced."""
    service: Service = http.app.state.service
    path = Path(body.path) if body.path is not None else AdapterStore(service.store.home).find(body.name).path
    try:
        record = service.models.load_adapter(body.name, path, body.model, scale=body.scale)
    except InvalidModelFileError as error:
        raise AdapterError(str(error)) from None  # the request chose the file
    except OSError as error:  # a path that is too long, a folder that may not be entered
        raise AdapterError(f"The adapter's file cannot be read: {error.strerror}") from None
    return Response(_wire(record).to_json(), media_type="application/json")


@router.delete("/v1/adapters/{name}", response_model=AdapterUnloaded, summary="Unload an adapter")
def unload_adapter(name: str, http: Request) -> Response:
    """Requests that are using it end with an error. The file stays."""
    service: Service = http.app.state.service
    service.models.unload_adapter(name)
    return Response(AdapterUnloaded(id=name).to_json(), media_type="application/json")
