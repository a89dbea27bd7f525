"""Gradients of the sparse, packed, chunked trainer against those of a plain dense model with PEFT's LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from edgellm.errors import ConfigError  # noqa: E402
from edgellm.tune.architecture import TARGETS  # noqa: E402
from edgellm.tune.decoder import Decoder  # noqa: E402
from edgellm.tune.lora import Lora, LoraConfig  # noqa: E402
from edgellm.tune.loss import token_losses  # noqa: E402
from edgellm.tune.prefix_tree import pack  # noqa: E402
from edgellm.tune.scheme import Site  # noqa: E402
from edgellm.tune.weights import BaseWeights  # noqa: E402
from tests.support.tiny_gguf import write_tiny_llama  # noqa: E402
from tests.tune.dense import DenseDecoder, to_transformers  # noqa: E402
from tests.tune.rig import TEXT  # noqa: E402

SEQUENCES = [list(TEXT[:23]), list(TEXT[5:60]), list(TEXT[40:52]), list(TEXT[:16] + TEXT[60:70])]
ANSWERS = [[place > 10 for place in range(23)], [place % 3 != 1 for place in range(55)], [False] * 6 + [True] * 6]
ANSWERS.append([place > 12 for place in range(26)])  # begins like the first, also with some of its answer
SCHEMES = {
    "everything": [Site(layer, tensor) for layer in range(3) for tensor in TARGETS],
    "top": [Site(2, tensor) for tensor in TARGETS],
    "sparse": [Site(1, "ffn_down"), Site(2, "attn_q"), Site(2, "attn_k"), Site(2, "ffn_gate")],
}


def _loss(decoder: Decoder, lora: Lora) -> torch.Tensor:
    """The sum over answer tokens of all SEQUENCES, packed; each row predicts the next."""
    packed = pack([sequence[:-1] for sequence in SEQUENCES])
    assert len(packed.tokens) < sum(len(sequence) - 1 for sequence in SEQUENCES)
    answers = torch.tensor([answer for some in ANSWERS for answer in some[1:]])
    rows = torch.cat([packed.rows(number) for number in range(len(SEQUENCES))])[answers]
    targets = torch.tensor([token for sequence in SEQUENCES for token in sequence[1:]])[answers]
    hidden = decoder.normalise(decoder.hidden(packed, lora)[rows])
    return token_losses(hidden, decoder.head, targets).losses.sum()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("architecture", "tied"), [("llama", True), ("qwen2", False), ("qwen3", False)])
def test_gradients_are_exact(tmp_path: Path, architecture: str, tied: bool, scheme: str) -> None:
    path = write_tiny_llama(
        tmp_path / "m.gguf", architecture=architecture, layers=3, tied=tied, weights="q8_0", norm_spread=0.5
    )
    weights, config = BaseWeights(path), LoraConfig(rank=3, alpha=5.0, rank_stabilised=scheme == "top")
    lora = Lora(weights.architecture, SCHEMES[scheme], config, seed=1)
    torch.manual_seed(2)
    pairs = {}
    for site, (a, b) in lora.pairs.items():
        with torch.no_grad():
            b.normal_(std=0.05)  # at zero, A has no gradient
        turned = to_transformers(b.detach(), weights.architecture, site.tensor)
        pairs[site] = (a.detach().clone().requires_grad_(), turned.clone().requires_grad_())
    ours = _loss(Decoder(weights, dtype=torch.float32), lora)
    dense = DenseDecoder(weights, pairs, config.scale)
    theirs = sum(dense.loss(sequence, answers) for sequence, answers in zip(SEQUENCES, ANSWERS, strict=True))
    assert torch.allclose(ours, theirs, rtol=1e-5)
    ours.backward()
    theirs.backward()
    for site, (a, b) in lora.pairs.items():
        expected_a, expected_b = (part.grad for part in pairs[site])
        found_b = to_transformers(b.grad, weights.architecture, site.tensor)
        for found, expected in ((a.grad, expected_a), (found_b, expected_b)):
            assert float(expected.norm()) > 0
            assert float((found - expected).norm() / expected.norm()) < 1e-4, site


def test_half_floats_point_the_same_way(tmp_path: Path) -> None:
    weights = BaseWeights(write_tiny_llama(tmp_path / "m.gguf", layers=3, weights="q8_0"))
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        lora = Lora(weights.architecture, SCHEMES["everything"], LoraConfig(rank=3), seed=1)
        for _, b in lora.pairs.values():
            with torch.no_grad():
                b.normal_(std=0.05, generator=torch.Generator().manual_seed(3))
        _loss(Decoder(weights, dtype=dtype), lora).backward()
        gradients.append(torch.cat([parameter.grad.reshape(-1) for parameter in lora.parameters()]))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 0.05


def test_a_new_adapter_changes_nothing(tmp_path: Path) -> None:
    decoder = Decoder(BaseWeights(write_tiny_llama(tmp_path / "m.gguf")), dtype=torch.float32)
    lora = Lora(decoder.shape, [Site(0, tensor) for tensor in TARGETS], LoraConfig())
    again = Lora(decoder.shape, [Site(0, tensor) for tensor in reversed(TARGETS)], LoraConfig())
    assert all(map(torch.equal, lora.parameters(), again.parameters()))
    packed = pack(SEQUENCES)
    assert torch.equal(decoder.logits(packed, lora), decoder.logits(packed))
    assert (LoraConfig(4, 8.0).scale, LoraConfig(4, 8.0, rank_stabilised=True).scale) == (2.0, 4.0)


def test_adapters_that_cannot_be(tmp_path: Path) -> None:
    shape = BaseWeights(write_tiny_llama(tmp_path / "m.gguf")).architecture
    for sites in ([], [Site(2, "attn_q")], [Site(-1, "attn_q")], [Site(0, "attn_norm")]):
        with pytest.raises(ConfigError, match="to train"):
            Lora(shape, sites, LoraConfig())
    for rank, alpha in ((0, 1.0), (4, 0.0), (4, float("nan")), (4, float("inf"))):
        with pytest.raises(ConfigError, match="lora"):
            LoraConfig(rank, alpha)
