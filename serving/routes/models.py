"""GET /v1/models and /v1/models/{id}: what can be named in a request's `model`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from edgellm.engine.manager import AdapterRecord
from edgellm.errors import ModelNotFoundError
from edgellm.models.store import StoredModel
from serving.service import Service
from serving.wire.models import Model, ModelDeleted, ModelList

router = APIRouter()


def _model(service: Service, model: StoredModel) -> Model:
    body = Model(id=model.name, created=model.created, owned_by="edgellm", size_bytes=model.bytes)
    loaded = next((known for known in service.models.loaded() if known.name == model.name), None)
    body.loaded = loaded is not None
    if loaded is not None:
        body.context_tokens = loaded.context_tokens
    return body


def _adapter(record: AdapterRecord) -> Model:
    return Model(id=record.name, created=record.created, owned_by=record.owner or record.model)


def _all(service: Service) -> list[Model]:
    models = [_model(service, model) for model in service.models.models()]
    return models + [_adapter(record) for record in service.models.adapters()]


@router.get("/v1/models", response_model=ModelList, summary="List the models")
def list_models(http: Request) -> Response:
    """The default model first; adapters, which can be named as models too, last."""
    return Response(ModelList(data=_all(http.app.state.service)).to_json(), media_type="application/json")


@router.get("/v1/models/{model_id:path}", response_model=Model, summary="One model")
def show_model(model_id: str, http: Request) -> Response:
    """404 `model_not_found` if there is none of that name."""
    service: Service = http.app.state.service
    wanted = service.models.full_name(model_id).lower()
    for model in _all(service):
        if model.id.lower() == wanted:
            return Response(model.to_json(), media_type="application/json")
    raise ModelNotFoundError(f"The model '{model_id}' does not exist")


@router.delete("/v1/models/{model_id:path}", response_model=ModelDeleted, summary="Delete a fine-tuned model")
def delete_model(model_id: str, http: Request) -> Response:
    """Only a model that was fine-tuned here, or a checkpoint of one; requests that are using it end with an error."""
    service: Service = http.app.state.service
    service.tuning.delete_model(model_id)
    return Response(ModelDeleted(id=model_id, deleted=True).to_json(), media_type="application/json")
