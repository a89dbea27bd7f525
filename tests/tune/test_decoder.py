"""The trainer's forward pass against llama.cpp's, what keeps packed sequences apart, and what has no graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from edgellm.backend.model import Model  # noqa: E402
from edgellm.errors import ModelUnsupportedError  # noqa: E402
from edgellm.models.bundled import bundled_path  # noqa: E402
from edgellm.tune.architecture import TARGETS  # noqa: E402
from edgellm.tune.decoder import Decoder  # noqa: E402
from edgellm.tune.lora import Lora, LoraConfig  # noqa: E402
from edgellm.tune.prefix_tree import Packed, pack  # noqa: E402
from edgellm.tune.scheme import Site  # noqa: E402
from edgellm.tune.weights import BaseWeights, compute_type  # noqa: E402
from tests.support.rewrite import rewrite  # noqa: E402
from tests.support.tiny_gguf import write_tiny_llama, write_tiny_mamba  # noqa: E402
from tests.tune.rig import TEXT, divergence, true_logits  # noqa: E402

TOKENS = list(TEXT)


def _decoder(path: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return Decoder(BaseWeights(path), dtype=dtype)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_logits_are_those_of_llama_cpp(tmp_path: Path, architecture: str, tied: bool) -> None:
    path = write_tiny_llama(
        tmp_path / "m.gguf", architecture=architecture, layers=7, tied=tied, norm_spread=0.5, seed=3
    )
    expected, found = true_logits(path, TOKENS), _decoder(path).logits(pack([TOKENS]))
    # llama.cpp keeps keys and values as 16-bit floats, and Gemma's activations grow.
    assert torch.allclose(found, expected, atol=3e-3 * float(expected.std()) + 2e-2)
    kl, agreement = divergence(expected, found)
    assert kl < 1e-4
    assert agreement >= 0.97


def test_half_floats_stay_near(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", architecture="qwen2", weights="q8_0", seed=3)
    kl, _ = divergence(true_logits(path, TOKENS), _decoder(path, torch.bfloat16).logits(pack([TOKENS])))
    assert kl < 0.01


def test_the_bundled_model(pytestconfig: pytest.Config) -> None:
    path = bundled_path()
    assert path is not None
    model = Model(path)
    text = (pytestconfig.rootpath / "LICENSE").read_text()[2000:3600]
    tokens = model.vocab.tokenize(text, add_special=True, parse_special=False)
    model.close()
    expected, found = true_logits(path, tokens), _decoder(path, compute_type()).logits(pack([tokens]))
    kl, agreement = divergence(expected, found)
    assert kl < 0.01
    # llama.cpp rounds activations to 8 bits, so that it agrees with itself, on the same weights as floats or with flash
    # attention, on 94 to 98 % of tokens only. The others are near ties: little likelihood is lost by the other choice.
    assert agreement >= 0.94
    likelihood = expected.softmax(1)
    lost = likelihood.amax(1) - likelihood.gather(1, found.argmax(1, keepdim=True))[:, 0]
    assert float((lost < 0.02).float().mean()) >= 0.97


def test_packed_sequences_are_as_if_alone(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", architecture="gemma3", layers=6)
    decoder, sequences = _decoder(path), [TOKENS[:9], TOKENS[3:40], TOKENS[:6] + TOKENS[20:50], TOKENS[7:8], TOKENS[:5]]
    packed = pack(sequences)
    assert len(packed.tokens) == sum(map(len, sequences)) - 5 - 5  # what they begin with is there once
    together = decoder.logits(packed)
    for number, sequence in enumerate(sequences):
        assert torch.allclose(together[packed.rows(number)], decoder.logits(pack([sequence])), atol=1e-4)


class _Watched(Decoder):
    """Writes down which products run backward."""

    def __init__(self, weights: BaseWeights) -> None:
        super().__init__(weights, dtype=torch.float32)
        self.forward: list[tuple[str, bool]] = []
        self.backward: list[str] = []

    def _linear(self, x: torch.Tensor, sites: Sequence[Site], lora: Lora | None) -> tuple[torch.Tensor, ...]:
        found = super()._linear(x, sites, lora)
        for y, site in zip(found, sites, strict=True):
            self.forward.append((site.name, y.requires_grad))
            if y.requires_grad:
                y.register_hook(lambda _, name=site.name: self.backward.append(name))
        return found


def test_nothing_below_the_lowest_trained_matrix_has_a_graph(tmp_path: Path) -> None:
    decoder = _Watched(BaseWeights(write_tiny_llama(tmp_path / "m.gguf", layers=4)))
    lora = Lora(decoder.shape, [Site(2, "ffn_down"), Site(3, "attn_v")], LoraConfig(rank=2))
    packed = pack([TOKENS])
    assert not decoder.prefix(packed, 2).requires_grad
    decoder.forward.clear()
    decoder.hidden(packed, lora).sum().backward()
    above = [Site(2, "ffn_down").name, *(Site(3, target).name for target in TARGETS)]
    assert [name for name, graph in decoder.forward if graph] == above
    assert sorted(decoder.backward) == sorted(above)
    assert [name for name, _ in decoder.forward] == [Site(n, t).name for n in range(4) for t in TARGETS]


def test_a_kept_prefix_gives_the_same(tmp_path: Path) -> None:
    decoder = _decoder(write_tiny_llama(tmp_path / "m.gguf", layers=3))
    lora = Lora(decoder.shape, [Site(2, "attn_q")], LoraConfig())
    packed: Packed = pack([TOKENS[:20], TOKENS[20:50]])
    kept = decoder.prefix(packed, lora.lowest_layer).clone()
    assert torch.equal(decoder.suffix(kept, packed, lora), decoder.hidden(packed, lora))


def test_other_models_are_refused(tmp_path: Path) -> None:
    mixture = write_tiny_llama(tmp_path / "mixture.gguf", experts=4)
    with pytest.raises(ModelUnsupportedError, match="expert_count"):
        BaseWeights(mixture)
    with pytest.raises(ModelUnsupportedError, match="'mamba' cannot be tuned"):
        BaseWeights(write_tiny_mamba(tmp_path / "mamba.gguf"))
    tiny = write_tiny_llama(tmp_path / "m.gguf")
    windowed = rewrite(
        tiny, tmp_path / "w.gguf", values={"llama.rope.dimension_count": 16}, more={"llama.attention.sliding_window": 8}
    )
    with pytest.raises(ModelUnsupportedError, match="sliding window"):
        BaseWeights(windowed)
