"""/v1/fine_tuning/jobs, as OpenAI has them. Unknown fields are refused: misspelt, they would cost hours of training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag

from edgellm.config import parse_bytes
from edgellm.errors import ConfigError
from edgellm.tune.names import SUFFIX_CHARS_MAX
from edgellm.tune.scheme import check_scheme
from serving.wire.common import NULL_IS_DEFAULT, RequestModel, ResponseModel, Text, fault

SEED_MAX = (1 << 31) - 1
METADATA_MAX = 16
_Auto = Annotated[Literal["auto"], Tag("#text")]
_either = Discriminator(lambda value: "#text" if isinstance(value, str) else "#number")


def _size(value: str) -> str:
    try:
        if parse_bytes(value) < 1:
            raise fault("must be more than nothing")
    except ValueError:
        raise fault("must be a size such as 2GiB, or a number of bytes") from None
    return value


def _scheme(value: str) -> str:
    try:
        check_scheme(value)
    except ConfigError as error:
        raise fault(f"is no scheme: {error}") from None
    return value


AutoEpochs = Annotated[_Auto | Annotated[int, Field(ge=1, le=50), Tag("#number")], _either]
AutoBatch = Annotated[_Auto | Annotated[int, Field(ge=1, le=256), Tag("#number")], _either]
AutoRank = Annotated[_Auto | Annotated[int, Field(ge=1, le=256), Tag("#number")], _either]
AutoRate = Annotated[_Auto | Annotated[float, Field(gt=0, le=1000), Tag("#number")], _either]
AutoBeta = Annotated[_Auto | Annotated[float, Field(gt=0, le=2), Tag("#number")], _either]
Size = Annotated[
    Annotated[Text, Field(max_length=32), AfterValidator(_size), Tag("#text")]
    | Annotated[int, Field(ge=1, lt=1 << 63), Tag("#number")],
    _either,
]


class _Strict(RequestModel):
    model_config = ConfigDict(extra="forbid")


class Hyperparameters(_Strict):
    n_epochs: AutoEpochs | None = Field(default=None, description="How often the training file is read.")
    batch_size: AutoBatch | None = Field(default=None, description="Examples a step.")
    learning_rate_multiplier: AutoRate | None = Field(default=None, description="Of the trainer's own learning rate.")
    lora_rank: AutoRank | None = Field(default=None, description="Extension. Rank of the adapter's matrices.")
    sparsity: Annotated[Text, Field(max_length=1000), AfterValidator(_scheme)] | None = Field(
        default=None,
        description="Extension. Which matrices are trained: auto (chosen by an analysis), none (all of them), or a "
        "scheme such as top-8 or 20-29:attn_v,ffn_down.",
    )
    memory_budget_bytes: Size | None = Field(
        default=None, description='Extension. Most memory that the trainer may need: bytes, or a text such as "2GiB".'
    )
    time_budget_s: Annotated[float, Field(gt=0, le=1e9)] | None = Field(
        default=None, description="Extension. About how many seconds it may take: less is trained if need be."
    )

    def as_json(self) -> dict[str, Any]:
        """What was given; sizes in bytes."""
        found = self.model_dump(exclude_none=True)
        if "memory_budget_bytes" in found:
            found["memory_budget_bytes"] = parse_bytes(found["memory_budget_bytes"])
        return found


class DpoHyperparameters(Hyperparameters):
    beta: AutoBeta | None = Field(default=None, description="How closely the model is held to what it was.")


class SupervisedMethod(_Strict):
    hyperparameters: Hyperparameters | None = None


class DpoMethod(_Strict):
    hyperparameters: DpoHyperparameters | None = None


class FineTuningMethod(_Strict):
    type: Literal["supervised", "dpo"]
    supervised: SupervisedMethod | None = None
    dpo: DpoMethod | None = None


class OldHyperparameters(_Strict):
    """The top-level ones that OpenAI has deprecated."""

    n_epochs: AutoEpochs | None = None
    batch_size: AutoBatch | None = None
    learning_rate_multiplier: AutoRate | None = None


_Key = Annotated[Text, Field(max_length=64)]
_Value = Annotated[Text, Field(max_length=512)]


def _no_integrations(value: list[Any]) -> list[Any]:
    if value:
        raise fault("must be empty: jobs of this server report to nobody")
    return value


class FineTuningJobRequest(_Strict):
    model: Annotated[Text, Field(min_length=1, max_length=512)] = Field(description="The base: a model that is served.")
    training_file: Annotated[Text, Field(min_length=1, max_length=128)] = Field(
        description="Id of an uploaded file, whose every example is checked before the job is made."
    )
    validation_file: Annotated[Text, Field(min_length=1, max_length=128)] | None = None
    suffix: Annotated[Text, Field(min_length=1, max_length=SUFFIX_CHARS_MAX)] | None = Field(
        default=None, description="Becomes a part of the fine-tuned model's name."
    )
    seed: Annotated[int, Field(ge=0, le=SEED_MAX)] | None = Field(default=None, description="Default: drawn at random.")
    method: FineTuningMethod | None = Field(default=None, description="Default: supervised.")
    hyperparameters: OldHyperparameters | None = Field(
        default=None, deprecated=True, description="The same as method.supervised.hyperparameters."
    )
    metadata: Annotated[dict[_Key, _Value], Field(max_length=METADATA_MAX)] | None = None
    integrations: Annotated[list[Any], AfterValidator(_no_integrations), NULL_IS_DEFAULT] = Field(
        default_factory=list, description="Must be empty."
    )

    def method_json(self) -> dict[str, Any]:
        """The method as it is kept, with the hyperparameters that were given."""
        if self.method is None:
            old = self.__dict__["hyperparameters"]
            found = old.model_dump(exclude_none=True) if old is not None else {}
            return {"type": "supervised", "supervised": {"hyperparameters": found}}
        kind = self.method.type
        own: SupervisedMethod | DpoMethod | None = getattr(self.method, kind)
        found = own.hyperparameters.as_json() if own is not None and own.hyperparameters is not None else {}
        return {"type": kind, kind: {"hyperparameters": found}}


class FineTuningError(ResponseModel):
    code: str
    message: str
    param: str | None = Field(default=None, description="training_file, validation_file or model, if that is at fault.")

    null_sent = frozenset({"param"})


class FineTuningJob(ResponseModel):
    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int = Field(description="In Unix seconds, as all times.")
    error: FineTuningError | None = None
    fine_tuned_model: str | None = None
    finished_at: int | None = None
    hyperparameters: dict[str, Any] = Field(description='As asked for, and what "auto" came to once that is known.')
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: str
    trained_tokens: int | None = None
    training_file: str
    validation_file: str | None = None
    estimated_finish: int | None = None
    integrations: list[Any] = Field(default_factory=list)
    metadata: dict[str, str]
    method: dict[str, Any]

    null_sent = frozenset(
        {
            "error",
            "fine_tuned_model",
            "finished_at",
            "trained_tokens",
            "validation_file",
            "estimated_finish",
            "integrations",
        }
    )


class FineTuningJobList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[FineTuningJob]
    has_more: bool


class FineTuningEvent(ResponseModel):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class FineTuningEventList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[FineTuningEvent]
    has_more: bool


class FineTuningCheckpoint(ResponseModel):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: dict[str, float]
    step_number: int


class FineTuningCheckpointList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[FineTuningCheckpoint]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None

    null_sent = frozenset({"first_id", "last_id"})
