"""The exceptions edgellm raises on purpose. Anything else that escapes is a bug.

EdgeLLMError
├── ConfigError                    a setting is unknown, malformed or contradicts another
├── RequestError                   the request is at fault; `param` names the field
│   ├── ContextLengthError         prompt longer than the model's context
│   ├── SchemaError                a JSON schema that a grammar cannot express; says which part
│   ├── GrammarError               a GBNF grammar that llama.cpp refuses
│   ├── ChatTemplateError          the model's template refused the messages, or ran too long
│   ├── TrainingDataError          a training file with faults; carries their lines
│   ├── FileTooLargeError          an upload of more bytes than are taken
│   └── JobStateError              a fine-tuning job that is not in a state to do that
├── NotFoundError                  a thing named by the request is not there
│   ├── ModelNotFoundError
│   ├── AdapterNotFoundError
│   ├── StoredFileNotFoundError
│   └── JobNotFoundError
├── ModelError                     the model, not the request, is at fault
│   ├── InvalidModelFileError      not a sound GGUF file
│   ├── ModelUnsupportedError      a sound file that cannot do what is asked
│   ├── ModelLoadError             llama.cpp could not load it
│   ├── ModelTooLargeError         does not fit the memory budget; carries the numbers
│   └── PullError                  a download failed
├── PackError                      an expert pack cannot be written
├── InvalidTraceError              a file of routing traces (mixture of experts) is unsound
├── AdapterError                   a LoRA adapter is unsound or does not fit the model
├── BaseChangedError               the base model's file is not the one that a fine-tuning run was begun with
├── NotInstalledError              a part of edgellm that is not installed; says how to install it
├── StorageError                   the state directory cannot be read or written, or its disk is full
├── OverloadedError                the queue is full; try again after `retry_after_s`
├── ShuttingDownError              the server is on its way out
├── RequestTimeoutError            the request's own time limit passed
├── GuardFailedError               the guard failed while judging a text
└── BackendError                   llama.cpp failed while computing
    └── ExpertReadError            an expert of a paged model could not be read
"""

from __future__ import annotations

from collections.abc import Sequence


class EdgeLLMError(Exception):
    """Base of every deliberate error. `str(error)` is fit to be shown to a user."""


class ConfigError(EdgeLLMError):
    """A setting is unknown, malformed or contradicts another."""


class RequestError(EdgeLLMError):
    """The request is at fault. `param` is the dotted path of the field, where one is to blame."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(RequestError):
    """The prompt does not fit the context.

    `prompt_tokens` is exact, or a lower bound when `at_least` is set (hopeless prompts are not tokenised in full).
    """

    def __init__(self, prompt_tokens: int, context_tokens: int, *, at_least: bool = False, param: str | None = None):
        some = f"at least {prompt_tokens}" if at_least else str(prompt_tokens)
        super().__init__(
            f"This model's maximum context length is {context_tokens} tokens, but the prompt has {some} tokens. "
            "Please shorten the prompt.",
            param,
        )
        self.prompt_tokens = prompt_tokens
        self.context_tokens = context_tokens
        self.at_least = at_least


class SchemaError(RequestError):
    """A JSON schema that cannot be expressed as a grammar. `path` is a JSON pointer into the schema."""

    def __init__(self, message: str, path: str = "", param: str | None = None) -> None:
        super().__init__(f"{message} (at {path or '/'} in the schema)", param)
        self.path = path


class GrammarError(RequestError):
    """llama.cpp refuses this GBNF grammar."""


class ChatTemplateError(RequestError):
    """The chat template raised, ran over its limits, or the model has none."""


class TrainingDataError(RequestError):
    """A training file that cannot be used. `faults` are (line from 1, or 0 for the whole file; what is wrong there).

    `more`: the file was not read to its end, for there were too many already.
    """

    def __init__(self, faults: Sequence[tuple[int, str]], param: str, *, more: bool = False) -> None:
        shown = "; ".join(f"line {line}: {text}" if line else text for line, text in faults)
        super().__init__(shown + ("; there may be more" if more else ""), param)
        self.faults = tuple(faults)
        self.more = more


class FileTooLargeError(RequestError):
    """An uploaded file has more bytes than are taken."""


class JobStateError(RequestError):
    """The fine-tuning job's state does not allow that: it has ended, or is not running."""


class NotFoundError(EdgeLLMError):
    """A thing named by the request is not there."""


class ModelNotFoundError(NotFoundError):
    """No model of that name, or its file is gone."""


class AdapterNotFoundError(NotFoundError):
    """No adapter of that name is loaded."""


class StoredFileNotFoundError(NotFoundError):
    """No uploaded file of that id, or its content is gone."""


class JobNotFoundError(NotFoundError):
    """No fine-tuning job of that id."""


class ModelError(EdgeLLMError):
    """The model, not the request, is at fault."""


class InvalidModelFileError(ModelError):
    """Not a sound GGUF file: refused before llama.cpp reads it."""


class ModelUnsupportedError(ModelError):
    """A sound model that cannot do what is asked of it."""


class ModelLoadError(ModelError):
    """llama.cpp could not load the model or make a context for it."""


class ModelTooLargeError(ModelError):
    """The model does not fit the memory budget. All figures in bytes."""

    def __init__(self, message: str, *, needed_bytes: int, budget_bytes: int, in_use_bytes: int = 0) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.budget_bytes = budget_bytes
        self.in_use_bytes = in_use_bytes


class PullError(ModelError):
    """A download failed; what had arrived is kept for the next try, or removed if it is unusable."""


class PackError(EdgeLLMError):
    """An expert pack cannot be written, or a model cannot be packed within the loss that was allowed."""


class InvalidTraceError(EdgeLLMError):
    """A routing trace, or a table learned from one, that cannot be used."""


class AdapterError(EdgeLLMError):
    """A LoRA adapter is unsound or does not fit the model."""


class BaseChangedError(EdgeLLMError):
    """The base model's file is not the one that a fine-tuning run was begun with."""


class NotInstalledError(EdgeLLMError):
    """What is asked for needs packages that are not installed."""


class StorageError(EdgeLLMError):
    """The state directory cannot be read or written, or its disk is full."""


class OverloadedError(EdgeLLMError):
    """The queue is full. `retry_after_s` is a hint in seconds."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ShuttingDownError(EdgeLLMError):
    """The server takes no new work."""


class RequestTimeoutError(EdgeLLMError):
    """The request's own time limit passed."""


class GuardFailedError(EdgeLLMError):
    """The guard failed while judging a text; the log says how."""


class BackendError(EdgeLLMError):
    """llama.cpp failed while computing."""


class ExpertReadError(BackendError):
    """An expert could not be read from the model's file: the step that needed it is lost, later ones may work."""
