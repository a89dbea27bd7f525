"""What a model file is: finding, pulling, verifying and describing GGUF files and adapters; the bundled default."""

from edgellm.models.bundled import DEFAULT_MODEL
from edgellm.models.describe import AdapterInfo, ModelInfo, describe
from edgellm.models.gguf import GGUFHeader, TensorInfo, read_header
from edgellm.models.hub import PullProgress, pull
from edgellm.models.memory import MemoryEstimate, available_memory_bytes, estimate_memory
from edgellm.models.split import split_paths
from edgellm.models.store import AdapterStore, ModelStore, StoredModel

__all__ = [
    "DEFAULT_MODEL",
    "AdapterInfo",
    "AdapterStore",
    "GGUFHeader",
    "MemoryEstimate",
    "ModelInfo",
    "ModelStore",
    "PullProgress",
    "StoredModel",
    "TensorInfo",
    "available_memory_bytes",
    "describe",
    "estimate_memory",
    "pull",
    "read_header",
    "split_paths",
]
