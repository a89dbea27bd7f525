"""Adapters that were trained, in llama.cpp: it must compute what the trainer computes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from edgellm.models import describe  # noqa: E402
from edgellm.models.gguf import read_header  # noqa: E402
from edgellm.tune.architecture import TARGETS  # noqa: E402
from edgellm.tune.decoder import Decoder  # noqa: E402
from edgellm.tune.export import export_adapter  # noqa: E402
from edgellm.tune.lora import Lora, LoraConfig  # noqa: E402
from edgellm.tune.loss import token_losses  # noqa: E402
from edgellm.tune.prefix_tree import pack  # noqa: E402
from edgellm.tune.scheme import Site  # noqa: E402
from edgellm.tune.weights import BaseWeights  # noqa: E402
from tests.support.tiny_gguf import write_tiny_llama  # noqa: E402
from tests.tune.rig import TEXT, divergence, true_logits  # noqa: E402

TRAINED, HELD_OUT = list(TEXT[:60]), list(TEXT[60:] + TEXT[10:50])
SITES = [Site(layer, tensor) for layer in (1, 2) for tensor in TARGETS]


def _train(decoder: Decoder, lora: Lora, steps: int) -> list[float]:
    """The losses of some steps on TRAINED."""
    optimiser = torch.optim.AdamW(lora.parameters(), lr=0.02)
    packed, losses = pack([TRAINED[:-1]]), []
    for _ in range(steps):
        hidden = decoder.normalise(decoder.hidden(packed, lora))
        loss = token_losses(hidden, decoder.head, torch.tensor(TRAINED[1:])).losses.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_llama_cpp_computes_what_was_trained(tmp_path: Path, architecture: str, stabilised: bool) -> None:
    base = write_tiny_llama(tmp_path / "m.gguf", architecture=architecture, layers=3, norm_spread=0.5)
    decoder = Decoder(BaseWeights(base), dtype=torch.float32)
    lora = Lora(decoder.shape, SITES, LoraConfig(rank=4, alpha=6.0, rank_stabilised=stabilised))
    losses = _train(decoder, lora, 8)
    assert losses[-1] < 0.8 * losses[0]
    export_adapter(lora, base, tmp_path / "a.gguf")
    found, plain = decoder.logits(pack([HELD_OUT]), lora), decoder.logits(pack([HELD_OUT]))
    expected = true_logits(base, HELD_OUT, tmp_path / "a.gguf")
    kl, agreement = divergence(expected, found.detach())
    assert kl < 1e-3
    assert agreement >= 0.97
    assert divergence(expected, plain)[0] > 0.1  # the adapter does much, and all of it is in the file


def test_what_the_file_says(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "m.gguf", layers=3)
    lora = Lora(BaseWeights(base).architecture, [Site(1, "attn_k"), Site(2, "ffn_down")], LoraConfig(rank=4, alpha=6.0))
    export_adapter(lora, base, tmp_path / "a.gguf", name="Ours")
    header = read_header(tmp_path / "a.gguf")
    assert dict(header.metadata) == {
        "general.type": "adapter",
        "general.architecture": "llama",
        "general.name": "Ours",
        "general.alignment": 32,
        "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
    }
    assert {tensor.name: (tensor.dims, tensor.type.name) for tensor in header.tensors} == {
        "blk.1.attn_k.weight.lora_a": ((64, 4), "F32"),
        "blk.1.attn_k.weight.lora_b": ((4, 32), "F32"),
        "blk.2.ffn_down.weight.lora_a": ((128, 4), "F32"),
        "blk.2.ffn_down.weight.lora_b": ((4, 64), "F32"),
    }
    assert describe(tmp_path / "a.gguf")


def test_a_failed_export_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_tiny_llama(tmp_path / "m.gguf")
    lora = Lora(BaseWeights(base).architecture, [Site(1, "attn_k")], LoraConfig())
    target = tmp_path / "adapters" / "a.gguf"
    export_adapter(lora, base, target)
    before = hashlib.sha256(target.read_bytes()).digest()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        export_adapter(lora, base, target)
    assert hashlib.sha256(target.read_bytes()).digest() == before
    assert [path.name for path in target.parent.iterdir()] == ["a.gguf"]
