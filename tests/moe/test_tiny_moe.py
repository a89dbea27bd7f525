"""The tiny mixtures of experts that other tests are built on: loaded by llama.cpp, and with routing that is real."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from edgellm.backend.batch import Batch
from edgellm.backend.context import Context, ContextParams
from edgellm.backend.model import Model
from edgellm.models.gguf import read_header
from tests.support.graph_tap import GraphTap
from tests.support.moe_traits import ARCHITECTURES
from tests.support.tiny_moe import write_tiny_moe

TEXT = "hello world: the name of the user is to be true in 42 null and false ways, you know?"
ROOM = 96
MERGED = [name for name, traits in ARCHITECTURES.items() if traits.gate_up == "either"]


@contextmanager
def running(path: Path, tap: GraphTap | None = None) -> Iterator[tuple[Context, list[int]]]:
    """A context of one sequence, and TEXT's tokens."""
    model = Model(path)
    callback = tap.callback if tap else None
    context = Context(model, ContextParams(256, 1, ROOM, ROOM, 1, eval_callback=callback))
    yield context, model.vocab.tokenize(TEXT, add_special=False, parse_special=False)
    context.close()
    model.close()


def decode(context: Context, tokens: list[int]) -> npt.NDArray[np.float32]:
    """Logits after each token, (tokens, vocabulary), from an empty cache."""
    context.clear()
    batch = Batch(ROOM)
    batch.extend(tokens, 0, 0, outputs=len(tokens))
    context.decode(batch)
    return np.stack([context.logits(row) for row in range(len(tokens))])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_decodes_and_routes_by_token(tmp_path: Path, architecture: str) -> None:
    path = write_tiny_moe(tmp_path / "a.gguf", architecture)
    assert path.stat().st_size < 2_500_000
    tap = GraphTap(["ffn_moe_topk"])
    with running(path, tap) as (context, tokens):
        logits = decode(context, tokens)
        again = decode(context, tokens)
    assert np.isfinite(logits).all()
    assert 1 < logits.std() < 6
    assert np.ptp(logits, axis=0).mean() > 1  # they depend on the token
    np.testing.assert_array_equal(logits, again)
    traits = ARCHITECTURES[architecture]
    mixtures = [layer for layer in range(traits.layers) if traits.has_experts(layer)]
    routes = tap.take()
    assert sorted(routes) == [f"ffn_moe_topk-{layer}" for layer in mixtures]
    for chosen in routes.values():
        assert chosen.shape == (2 * len(tokens), 2)
        assert len(np.unique(chosen)) >= 6  # of 8
        assert len(np.unique(np.sort(chosen, axis=1), axis=0)) >= 5  # pairs


@pytest.mark.parametrize("architecture", MERGED)
def test_experts_may_be_merged(tmp_path: Path, architecture: str) -> None:
    path = write_tiny_moe(tmp_path / "a.gguf", architecture, merged=True)
    names = {tensor.name.split(".")[2] for tensor in read_header(path).tensors if "_exps" in tensor.name}
    assert names >= {"ffn_gate_up_exps", "ffn_down_exps"}
    assert "ffn_gate_exps" not in names
    with running(path) as (context, tokens):
        assert np.isfinite(decode(context, tokens)).all()


@pytest.mark.parametrize("weights", ["q8_0", "q4_0", "mxfp4", "q4_k", "q6_k"])
@pytest.mark.parametrize("architecture", ["qwen3moe", "gpt-oss"])
def test_quantised_experts(tmp_path: Path, architecture: str, weights: str) -> None:
    path = write_tiny_moe(tmp_path / "a.gguf", architecture, weights=weights)
    assert write_tiny_moe(tmp_path / "b.gguf", architecture, weights=weights).read_bytes() == path.read_bytes()
    types = {tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors if tensor.name.endswith("_exps.weight")}
    assert types == {gguf.GGMLQuantizationType[weights.upper()]}
    with running(path) as (context, tokens):
        assert np.isfinite(decode(context, tokens)).all()


def test_the_shape_can_be_chosen(tmp_path: Path) -> None:
    path = write_tiny_moe(
        tmp_path / "a.gguf", "qwen3moe", layers=4, experts=12, experts_used=5, width=96, expert_width=32, seed=3
    )
    with running(path, tap := GraphTap(["ffn_moe_topk"])) as (context, tokens):
        decode(context, tokens)
    routes = tap.take()
    assert len(routes) == 4
    assert all(chosen.shape == (len(tokens), 5) and chosen.max() < 12 for chosen in routes.values())


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("qwen2", {}, "unknown architecture"),
        ("olmoe", {"merged": True}, "no merged experts"),
        ("llama4", {"layers": 3}, "4 layers"),
        ("olmoe", {"weights": "q3"}, "weights must be"),
        ("olmoe", {"weights": "q4_k", "width": 64}, "multiples of 256"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    tmp_path: Path, architecture: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_tiny_moe(tmp_path / "a.gguf", architecture, **options)
