"""GGUF files made of others, with something about them changed. Needs the development packages `gguf` and numpy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import gguf

_STACKED = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))_exps\.weight")


def rewrite(
    source: Path,
    target: Path,
    *,
    values: Mapping[str, int] | None = None,
    separate: bool = False,
    more: Mapping[str, int] | None = None,
) -> Path:
    """A copy of `source` with other whole numbers as `values` of its metadata, and `more` of them.

    `separate`: every expert is a tensor of its own, as in files of 2023. The tensors are then plain floats.
    """
    reader = gguf.GGUFReader(str(source))
    out = gguf.GGUFWriter(str(target), str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        out.add_key_value(field.name, (values or {}).get(field.name, field.contents()), kind, sub)
    for name, value in (more or {}).items():
        out.add_uint32(name, value)
    for tensor in reader.tensors:
        if separate and (match := _STACKED.fullmatch(tensor.name)):
            for expert, matrix in enumerate(tensor.data):
                out.add_tensor(f"{match[1]}.{expert}.weight", matrix)
        else:
            out.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return target
