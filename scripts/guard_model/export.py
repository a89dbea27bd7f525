"""The trained encoder as the files that `guards` reads: model.onnx with int8 weights, tokenizer.json."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process

from guard_model.encoder import Encoder


def write_model(encoder: Encoder, tokenizer: Path, folder: Path) -> None:
    """Writes `model.onnx` and `tokenizer.json`. Matrices and embeddings become int8, matrices with a scale for each
    output; activations are quantised as they come (dynamic quantisation)."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder.eval()
    axes = {"ids": {0: "windows", 1: "tokens"}, "logits": {0: "windows"}}
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact, prepared = Path(scratch) / "exact.onnx", Path(scratch) / "prepared.onnx"
        torch.onnx.export(
            encoder,
            (torch.ones(2, 16, dtype=torch.long),),
            str(exact),
            input_names=["ids"],
            output_names=["logits"],
            dynamic_axes=axes,
            dynamo=False,
            opset_version=17,
        )
        quant_pre_process(str(exact), str(prepared), skip_symbolic_shape=True)
        # 7 bits: with 8, AVX2's products of bytes saturate, and processors with VNNI would say something else.
        quantize_dynamic(
            prepared, folder / "model.onnx", weight_type=QuantType.QInt8, per_channel=True, reduce_range=True
        )
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
