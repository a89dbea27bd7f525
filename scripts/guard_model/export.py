"""The trained encoder as the files that `guards` reads: its two parts, with int8 weights, and the tokenizer."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from guard_model.encoder import Encoder

NGRAMS = "ngrams.npz"
FILES = ("first.onnx", "rest.onnx", "tokenizer.json", NGRAMS)
"""What a classifier consists of, beside its card."""


class _First(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.encoder.first(ids)


class _Rest(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.encoder.rest(states)


def write_model(encoder: Encoder, tokenizer: Path, folder: Path) -> None:
    """Writes FILES but NGRAMS. Matrices and embeddings become int8, matrices with a scale for each output; activations
    are quantised as they come (dynamic quantisation)."""
    folder.mkdir(parents=True, exist_ok=True)
    width = encoder.positions.shape[1]
    _export(_First(encoder), torch.ones(2, 16, dtype=torch.long), "ids", ["states", "logits"], folder / "first.onnx")
    _export(_Rest(encoder), torch.ones(2, 16, width), "states", ["logits"], folder / "rest.onnx")
    shutil.copyfile(tokenizer, folder / "tokenizer.json")


def _export(part: nn.Module, example: torch.Tensor, into: str, out: list[str], file: Path) -> None:
    tokens = {0: "windows", 1: "tokens"}
    axes = {into: tokens, "states": tokens, "logits": {0: "windows"}}
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact, prepared = Path(scratch) / "exact.onnx", Path(scratch) / "prepared.onnx"
        torch.onnx.export(
            part.eval(),  # the exporter leaves what it was given, and all in it, in the mode in which it was given
            (example,),
            str(exact),
            input_names=[into],
            output_names=out,
            dynamic_axes={name: axes[name] for name in (into, *out)},
            dynamo=False,
            opset_version=17,
        )
        quant_pre_process(str(exact), str(prepared), skip_symbolic_shape=True)
        # 7 bits: with 8, AVX2's products of bytes saturate, and processors with VNNI would say something else.
        quantize_dynamic(prepared, file, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
