"""What fine-tuned models are called, as OpenAI calls them: ft:<base>:<organisation>:<suffix>:<id>.

A checkpoint's name is its model's with `:ckpt-step-N`. Each is a sound name for an adapter in the store.
"""

from __future__ import annotations

import re

from edgellm.models.names import slug

ORGANISATION = "local"
SUFFIX_CHARS_MAX = 64
_BASE_CHARS = 80
_ID_CHARS = 8
_TUNED = re.compile(r"ft:[^:]+:[^:]+:[^:]*:[^:]+(:ckpt-step-\d+)?")


def tuned_name(base: str, suffix: str | None, job_id: str) -> str:
    """`base` is a model's name, of which the last part counts; of `suffix`, what a name can hold."""
    stem = _sound(base.rsplit("/", 1)[-1], _BASE_CHARS) or "model"
    return f"ft:{stem}:{ORGANISATION}:{sound_suffix(suffix)}:{job_id.rpartition('-')[2][:_ID_CHARS]}"


def checkpoint_name(tuned: str, step: int) -> str:
    """The name under which the adapter of a step can be used."""
    return f"{tuned}:ckpt-step-{step}"


def sound_suffix(suffix: str | None) -> str:
    """A suffix as it stands in a name: lower case, `-` for whatever is no letter, digit or one of ._-; may be empty."""
    return _sound(suffix or "", SUFFIX_CHARS_MAX)


def is_tuned_name(name: str) -> bool:
    """Whether a fine-tuned model, or a checkpoint of one, may be called that."""
    return _TUNED.fullmatch(name) is not None


def _sound(text: str, most_chars: int) -> str:
    try:
        return slug(text.replace("/", "-"))[:most_chars].strip("-")
    except ValueError:  # nothing is left, or it is too long
        return ""
