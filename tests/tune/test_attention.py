"""Attention over packs, block by block, against all scores of each sequence at once."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from edgellm.tune import attention as module  # noqa: E402
from edgellm.tune.attention import attention, blocks_of  # noqa: E402
from edgellm.tune.prefix_tree import Segment  # noqa: E402

GROUPS, SHARE, WIDTH, TOKENS, SCALE = 2, 2, 8, 13, 0.3
ROOT = Segment(0, 3)
MIDDLE = Segment(3, 7, (ROOT,))
SEGMENTS = (ROOT, MIDDLE, Segment(7, 9), Segment(9, 11, (ROOT,)), Segment(11, 13, (ROOT, MIDDLE)))


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Of each segment's sequence, the rows that are the segment's own."""
    results = []
    for one in SEGMENTS:
        rows = [row for part in (*one.before, one) for row in range(part.start, part.end)]
        at = torch.arange(len(rows))
        seen = at[:, None] >= at
        if window:
            seen &= at[:, None] - at < window
        heads = q.view(GROUPS, TOKENS, SHARE, WIDTH)[:, rows].transpose(1, 2)  # (groups, share, rows, width)
        scores = (heads @ k[:, None, rows].transpose(2, 3) * SCALE).masked_fill(~seen, -torch.inf)
        mixed = (scores.softmax(-1) @ v[:, None, rows]).transpose(1, 2)[:, one.position :]
        results.append(mixed.reshape(GROUPS, -1, WIDTH))
    return torch.cat(results, 1)


@pytest.mark.parametrize("short", [0, 4, 100])  # keys up to which weights are kept for backward
@pytest.mark.parametrize("queries", [1, 3, 100])  # tokens of a block
@pytest.mark.parametrize("window", [0, 1, 3])
def test_attention_and_its_gradients(monkeypatch: pytest.MonkeyPatch, window: int, queries: int, short: int) -> None:
    monkeypatch.setattr(module, "SHORT", short)
    monkeypatch.setattr(module, "QUERIES", queries)
    torch.manual_seed(0)
    q = torch.randn(GROUPS, TOKENS * SHARE, WIDTH, requires_grad=True)
    k, v = (torch.randn(GROUPS, TOKENS, WIDTH, requires_grad=True) for _ in range(2))
    found = attention(q, k, v, blocks_of(SEGMENTS, window), share=SHARE, scale=SCALE, window_tokens=window)
    expected = _dense(q, k, v, window)
    assert torch.allclose(found, expected, atol=1e-6)
    along = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(result, (q, k, v), along) for result in (found, expected))
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(ours, theirs, strict=True))


def test_a_window_leaves_out_keys_that_nobody_sees() -> None:
    blocks = blocks_of((Segment(0, 600),), 100)
    assert [(one.start, one.end) for one in blocks] == [(0, 128), (128, 256), (256, 384), (384, 512), (512, 600)]
    assert [one.keys for one in blocks[-2:]] == [(slice(285, 512),), (slice(413, 600),)]
    assert [one.past for one in blocks] == [0, 99, 99, 99, 99]
