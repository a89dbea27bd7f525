"""edgellm: an edge LLM runtime. The HTTP server that fronts it is the package `serving`."""

__version__ = "0.1.0"

__all__ = ["__version__"]
