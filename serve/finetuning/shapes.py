"""The objects of OpenAI's API as this one answers them: exactly the fields that its clients parse, ours beside them.

Each class is made from a row of the store. FastAPI describes the answers by them (GET /v1/openapi.json).

    >>> FileObject.of(row).status
    'processed'
"""

from typing import Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, Field

from loraport.serve.jobs.recipe import hyperparameters
from loraport.serve.store.tables import Checkpoint, Event, File, Job, Part, Permission, Status, Upload, Webhook

Item = TypeVar("Item", bound=BaseModel)
NOBODY, ORGANISATION = "-", "loraport"
METRICS = (
    *("step", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy"),
    *("full_valid_loss", "full_valid_mean_token_accuracy"),
)
AUTO = dict.fromkeys(("n_epochs", "batch_size", "learning_rate_multiplier"), "auto")


class ErrorBody(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """Every answer that is none."""

    error: ErrorBody


class Page(BaseModel, Generic[Item]):
    """A page of a list; the next one is asked for with `after`, the id of its last item."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class FileObject(BaseModel):
    """A file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"] = "processed"
    status_details: str | None = None
    expires_at: int | None = None

    @classmethod
    def of(cls, row: File) -> Self:
        """From its row."""
        return cls(
            id=row.id,
            bytes=row.bytes,
            created_at=int(row.created_at),
            filename=row.filename,
            purpose=row.purpose,
            status=row.status,  # type: ignore[arg-type]
            status_details=row.status_details,
            expires_at=whole(row.expires_at),
        )


class Deleted(BaseModel):
    """Something that is no more."""

    id: str
    object: str
    deleted: Literal[True] = True


class UploadObject(BaseModel):
    """A file that comes in parts; `file` once it is complete."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileObject | None = None

    @classmethod
    def of(cls, row: Upload, file: File | None = None) -> Self:
        """From its row, and that of the file it became."""
        return cls(
            id=row.id,
            bytes=row.bytes,
            created_at=int(row.created_at),
            expires_at=int(row.expires_at),
            filename=row.filename,
            purpose=row.purpose,
            status=row.status,  # type: ignore[arg-type]
            file=FileObject.of(file) if file else None,
        )


class PartObject(BaseModel):
    """A part of an upload."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str

    @classmethod
    def of(cls, row: Part) -> Self:
        """From its row."""
        return cls(id=row.id, created_at=int(row.created_at), upload_id=row.upload_id)


class JobError(BaseModel):
    """Why a job failed; `param`: what of the request was at fault."""

    code: str
    message: str
    param: str | None = None


class Ours(BaseModel):
    """What Loraport knows of a job beside OpenAI's fields."""

    options: dict[str, Any] = Field(description="The knobs of the request's `loraport`.")
    priority: int
    gpus: int
    wanted: str | None = Field(description="What was asked for and is not done yet: pause or cancel.")
    attempt: int = Field(description="Starts of the trainer so far.")
    queued_at: int | None
    started_at: int | None
    estimated_seconds: float | None = Field(description="Of training, as planned.")
    gpu_seconds: float
    adapter: str | None = Field(description="The adapter in the home of the endpoint, for its owner.")


class JobObject(BaseModel):
    """A fine-tuning job."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    status: Status
    model: str
    fine_tuned_model: str | None
    organization_id: str
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    error: JobError | None
    seed: int
    suffix: str | None
    method: dict[str, Any]
    hyperparameters: dict[str, Any]
    integrations: list[dict[str, Any]] | None
    metadata: dict[str, str] | None
    loraport: Ours

    @classmethod
    def of(cls, row: Job) -> Self:
        """From its row."""
        return cls(
            id=row.id,
            created_at=int(row.created_at),
            finished_at=whole(row.finished_at),
            estimated_finish=whole(row.estimated_finish),
            status=Status(row.status),
            model=row.model,
            fine_tuned_model=row.fine_tuned_model,
            organization_id=ORGANISATION if row.tenant == NOBODY else row.tenant,
            training_file=row.training_file,
            validation_file=row.validation_file,
            result_files=[file for file in (row.result_file, row.report_file) if file],
            trained_tokens=row.trained_tokens,
            error=JobError.model_validate({"code": "training_failed"} | row.error) if row.error else None,
            seed=row.seed,
            suffix=row.suffix,
            method=row.method,
            hyperparameters=AUTO | {k: v for k, v in hyperparameters(row.method).items() if k in AUTO},
            integrations=row.integrations,
            metadata=row.labels,
            loraport=ours(row),
        )


def ours(row: Job) -> Ours:
    """Our part of a job."""
    return Ours(
        options=row.options,
        priority=row.priority,
        gpus=row.gpus,
        wanted=row.wanted,
        attempt=row.attempt,
        queued_at=whole(row.queued_at),
        started_at=whole(row.started_at),
        estimated_seconds=row.estimated_s,
        gpu_seconds=row.gpu_s,
        adapter=row.adapter,
    )


class EventObject(BaseModel):
    """Something that happened in a job; `data` are its metrics."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]

    @classmethod
    def of(cls, row: Event) -> Self:
        """From its row."""
        return cls(
            id=row.id,
            created_at=int(row.created_at),
            level=row.level,  # type: ignore[arg-type]
            message=row.message,
            type=row.type,  # type: ignore[arg-type]
            data=row.data or {},
        )


class CheckpointObject(BaseModel):
    """A state of a job's training that can be asked as a model."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float]

    @classmethod
    def of(cls, row: Checkpoint) -> Self:
        """From its row."""
        known = {name: row.metrics[name] for name in METRICS if isinstance(row.metrics.get(name), int | float)}
        return cls(
            id=row.id,
            created_at=int(row.created_at),
            fine_tuned_model_checkpoint=row.model,
            fine_tuning_job_id=row.job_id,
            step_number=row.step,
            metrics={"step": row.step} | known,
        )


class PermissionObject(BaseModel):
    """A tenant (OpenAI's project) that may use a model."""

    id: str
    object: Literal["checkpoint.permission"] = "checkpoint.permission"
    created_at: int
    project_id: str

    @classmethod
    def of(cls, row: Permission) -> Self:
        """From its row."""
        return cls(id=row.id, created_at=int(row.created_at), project_id=row.tenant)


class WebhookObject(BaseModel):
    """Where somebody wants to be told; the secret itself is shown only when it is made."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    updated_at: int
    event_types: list[str]
    name: str
    url: str
    signing_secret_hint: str

    @classmethod
    def of(cls, row: Webhook, **more: Any) -> Self:
        """From its row; `more`: its secret, where it was made just now."""
        return cls(
            id=row.id,
            created_at=int(row.created_at),
            updated_at=int(row.updated_at or row.created_at),
            event_types=row.events,
            name=row.name or "",
            url=row.url,
            signing_secret_hint=f"{row.secret[:6]}…{row.secret[-4:]}",
            **more,
        )


class WebhookSecret(WebhookObject):
    """The same with its secret."""

    signing_secret: str


class WebhookTest(BaseModel):
    """What a webhook answered to a sample."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True] = True


class EventTypes(BaseModel):
    """What webhooks can be told of."""

    object: Literal["list"] = "list"
    data: list[str]


def whole(seconds: float | None) -> int | None:
    """A time as OpenAI's API has it."""
    return None if seconds is None else int(seconds)
