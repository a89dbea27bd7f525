"""Settings: one frozen, validated object, and the only place where a default stands.

Order of precedence: command line (keyword arguments here), environment (`EDGELLM_*`), `config.toml` in the state
directory, then the default written below. Unknown keys are refused, in the file as on the command line.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from edgellm.errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_DURATIONS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def home_dir() -> Path:
    """The directory that holds all state on disk: models, adapters, files, jobs. `EDGELLM_HOME` moves it."""
    moved = os.environ.get("EDGELLM_HOME")
    return Path(moved).expanduser() if moved else Path(platformdirs.user_data_dir("edgellm"))


def parse_bytes(value: Any) -> Any:
    """`"4GiB"`, `"500MB"`, `"1024"` or an int, in bytes. Other types pass through to pydantic."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", value.lower())
    if not match:
        raise ValueError(f"not a size: {value!r} (write 4GiB, 500MB or a number of bytes)")
    size = float(match[1]) * _UNITS[match[2] or ""]
    if size >= 2**63:
        raise ValueError(f"{value[:40]!r} is more than any machine has")
    return int(size)


def parse_seconds(value: Any) -> Any:
    """`"5m"`, `"90s"`, `"1h"`, `"300"` or a number, in seconds; `"never"` is infinite."""
    if not isinstance(value, str):
        return value
    if value.strip().lower() in {"never", "inf", "-1"}:
        return float("inf")
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd])?\s*", value.lower())
    if not match:
        raise ValueError(f"not a duration: {value!r} (write 30s, 5m, 1h or never)")
    return float(match[1]) * _DURATIONS[match[2] or ""]


def parse_expert_memory(value: Any) -> Any:
    """`"auto"`, `"off"`, or a size as `parse_bytes` reads it."""
    if isinstance(value, str) and value.strip().lower() in {"auto", "off"}:
        return value.strip().lower()
    try:
        return parse_bytes(value)
    except ValueError:
        raise ValueError(f"neither auto, off nor a size: {value!r} (write 4GiB, 500MB or a number of bytes)") from None


def _split_list(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _split_lines(value: Any) -> Any:
    return [line for line in value.splitlines() if line.strip()] if isinstance(value, str) else value


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
ExpertMemory = Annotated[Literal["auto", "off"] | Annotated[int, Field(ge=0)], BeforeValidator(parse_expert_memory)]
Seconds = Annotated[float, BeforeValidator(parse_seconds)]
TextList = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_list)]
GuardMode = Literal["refuse", "annotate", "off"]
GuardOnError = Literal["open", "closed"]
RuleList = Annotated[
    tuple[str, ...], NoDecode, BeforeValidator(_split_lines)
]  # commas are part of a regular expression


class Settings(BaseSettings):
    """Everything `edgellm serve` can be told. Field descriptions are the `--help` text."""

    model_config = SettingsConfigDict(env_prefix="EDGELLM_", extra="forbid", frozen=True)

    # What is served
    model: TextList = Field(
        (),
        description="Model to serve: a GGUF path or a pulled model's name; may be repeated. "
        "The first is the default model. "
        "None: the bundled SmolLM2-135M-Instruct.",
    )
    adapter: TextList = Field(
        (), description="LoRA adapter to load at start: the name of a stored one, or NAME=PATH; may be repeated."
    )
    keep_alive_s: Seconds = Field(
        300.0, ge=0, description="Unload a model idle for this long (30s, 5m, never). The default model stays."
    )
    memory_budget_bytes: Bytes | None = Field(
        None,
        gt=0,
        description="Most memory that loaded models may need together (4GiB). "
        "Default: 80 % of the memory available at start.",
    )

    # The engine
    context_tokens: int | None = Field(
        None,
        ge=64,
        le=1 << 22,
        description="KV cache cells a model gets, shared by all its requests. "
        "Default: the model's own context, at most 8192.",
    )
    parallel: int = Field(
        8, ge=1, le=128, description="Sequences a model answers at the same time; more wait in the queue."
    )
    prompt_chunk_tokens: int = Field(
        256,
        ge=16,
        le=8192,
        description="Most prompt tokens read in one step while other answers are running, "
        "so that their streams keep moving.",
    )
    prefix_memory_bytes: Bytes = Field(
        128 << 20,
        ge=0,
        description="Memory for finished conversations of a model, so that they need not be read again "
        "(256MiB; 0: none).",
    )
    threads: int | None = Field(
        None, ge=1, le=512, description="Threads that compute. Default: the physical cores this process may use."
    )
    flash_attention: Literal["auto", "on", "off"] = Field("auto", description="Flash attention: auto, on or off.")
    packed_weights: Literal["auto", "off"] = Field(
        "auto",
        description="auto: weights are rearranged on loading for this processor's vector instructions (AVX-512 VNNI, "
        "AVX2): prompts and answers are computed faster, often several times. off: llama.cpp's own layouts.",
    )
    huge_pages: Literal["auto", "off"] = Field(
        "auto",
        description="For models whose weights are not packed. auto: one that takes at most a quarter of the memory is "
        "read into memory of its own, in huge pages, which is faster (Linux 6.1+). off: the file is mapped, and other "
        "processes may share it.",
    )
    expert_memory_bytes: ExpertMemory = Field(
        "auto",
        description="Memory for the experts of a mixture-of-experts model (4GiB); the others are read from its file "
        "when they are needed. auto: as much as the memory budget leaves, all of them if they fit; a model that cannot "
        "be paged is mapped. off: llama.cpp maps the whole file.",
    )
    expert_checksums: Literal["on", "off"] = Field(
        "off",
        description="on: experts that are read are checked against checksums, which are made of the file at the first "
        "start; flash that has rotted ends a request with an error.",
    )
    draft: str = Field(
        "auto",
        min_length=1,
        description="What drafts the next tokens of answers, for the model to verify several in one step; the answers "
        "are what they are without. auto, ngram: the prompt, the answer so far and earlier answers. A GGUF path or a "
        "pulled model's name: that model as well, whatever its vocabulary, where it pays. none: nothing.",
    )
    adapt: Literal["on", "off"] = Field(
        "on",
        description="on: where a small model drafts, answers are kept on disk, readable by their owner alone, and the "
        "small model is trained on them while nobody waits, at the lowest priority; edgellm spec forget deletes all of "
        "it. off: nothing is kept and nothing is trained. Needs edgellm[tune].",
    )
    adapt_after_s: Seconds = Field(
        30.0,
        ge=0,
        description="Train the small model once nobody has waited for this long (30s, 5m, never) and other programs "
        "leave three quarters of the processors idle; 0s: whenever no request runs, whatever others do.",
    )
    queue_limit: int = Field(256, ge=1, le=100_000, description="Requests that may wait; one more is refused with 503.")

    # The guard
    guard: GuardMode = Field(
        "refuse",
        description="What becomes of prompts that the guard holds for unsafe. refuse: they are not answered. annotate: "
        "every answer says in x_guard what the guard found. off: nothing is judged but what /v1/moderations is given.",
    )
    guard_level: Literal["strict", "balanced"] = Field(
        "balanced",
        description="How sure the guard must be. strict: more of what is harmful is found, and more of what is "
        "harmless is refused. balanced: less of both.",
    )
    guard_on_error: GuardOnError = Field(
        "closed", description="What becomes of a prompt on which the guard fails. open: it is answered. closed: not."
    )
    guard_allow: RuleList = Field(
        (),
        description="What is never held against a prompt: words, or after re: a regular expression; may be repeated "
        "(in the environment: one a line). The rest of the prompt is judged.",
    )
    guard_block: RuleList = Field(
        (),
        description="What makes a prompt unsafe whatever else it says: words, or after re: a regular expression; may "
        "be repeated (in the environment: one a line).",
    )

    # HTTP
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_key_file: Path | None = Field(
        None, description="File with one API key a line; requests must then carry one as a Bearer token."
    )
    allowed_host: TextList = Field(
        (),
        description="Further Host header to accept (DNS rebinding guard); may be repeated. "
        "Loopback names and --host are always accepted; * accepts all.",
    )
    cors_origin: TextList = Field(
        (), description="Origin that browsers may call from; may be repeated. None: CORS stays off."
    )
    max_body_bytes: Bytes = Field(8 << 20, ge=1024, description="Largest request body accepted.")
    max_file_bytes: Bytes = Field(
        512 << 20, ge=1024, description="Largest file that can be uploaded for fine-tuning (512MiB)."
    )
    request_timeout_s: Seconds = Field(
        600.0,
        gt=0,
        description="Longest that one request may take (30s, 10m, never); a request's own timeout may be shorter.",
    )
    grace_seconds: Seconds = Field(
        10.0, ge=0, le=86_400, description="After SIGTERM, how long running answers may take to finish."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="How much is logged.")

    @model_validator(mode="after")
    def _adapters_have_names(self) -> Settings:
        for spec in self.adapter:
            name, given, path = spec.partition("=")
            if not name or (given and not path):
                raise ValueError(f"adapter {spec!r}: write NAME or NAME=PATH")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, home_dir() / "config.toml")


def load_settings(**overrides: Any) -> Settings:
    """Settings from all sources; `overrides` that are None count as not given.

    Raises ConfigError with one line for each faulty setting.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc'])) or 'settings'}: {item['msg']}" for item in error.errors()]
        raise ConfigError("; ".join(lines)) from None
    except ValueError as error:  # config.toml is not TOML
        raise ConfigError(f"config.toml: {error}") from None
