"""A text that every machine has: Python's own reference, to calibrate a model with where no other text is given."""

from __future__ import annotations

from edgellm.errors import ConfigError


def sample_text() -> str:
    """The topics of the Python reference (`pydoc_data.topics`, about 0.5 MB of English with code), in fixed order.

    It differs a little from one version of Python to the next. Raises ConfigError if this Python comes without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ConfigError("this Python comes without its reference (pydoc_data): name a text file to use") from None
    return "\n\n".join(topics[name].strip() for name in sorted(topics))
