"""How the encoder is trained, and how it scores."""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from guard_model.encoder import Encoder
from guard_model.encoding import Window
from guards.card import Handicaps, Weights
from guards.categories import CATEGORIES

_WEIGHTS = Weights(network=1.0, ngrams=0.6)
_FOREIGN_WEIGHTS = Weights(network=0.3, ngrams=3.0)  # the encoder's words are English
_HANDICAPS = Handicaps(sentence=2.5, doubling=0.7, doublings=3)
_TOGETHER = 64  # windows that the early head reads at once


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an encoder is trained."""

    layers: int = 6  # of the pretrained ones, the first
    early: int = 1  # of them before the early head
    frozen: int = 2  # of them, with the embeddings, that stay as they were pretrained: `early` or more
    probe_rate: float = 1e-3  # of a head alone
    early_epochs: float = 1.5  # of the early head
    probe_epochs: float = 0.15  # of the late head, before: what was pretrained is bent less (Kumar et al. 2022)
    rate: float = 1e-4  # of what was pretrained
    head_rate: float = 5e-4
    epochs: float = 1.6
    doubtful: float = 0.5  # share of harmless windows, those the early head is least sure of, that go on to the rest
    certain: float = 0.2  # share of the others that do: the rest seldom sees such windows in use
    batch_tokens: int = 1536
    warmup: float = 0.06  # share of all steps
    decay: float = 0.01
    jailbreak_weight: float = 0.3  # of its loss; that of `unsafe` is 1
    category_weight: float = 0.3  # of each
    weights: Weights = _WEIGHTS
    foreign_weights: Weights = _FOREIGN_WEIGHTS
    sentence_passing: float = -1.0  # n-grams' logit under which sentences are not judged by themselves
    handicaps: Handicaps = _HANDICAPS
    seed: int = 0


def batches(windows: Sequence[Window], tokens: int, chance: random.Random) -> list[list[Window]]:
    """Windows of like length together, at most `tokens` with padding; the batches in random order."""
    shuffled = list(windows)
    chance.shuffle(shuffled)
    shuffled.sort(key=lambda window: len(window.ids) // 8)
    found: list[list[Window]] = []
    longest = 0
    for window in shuffled:
        longest = max(longest, len(window.ids))
        if not found or (len(found[-1]) + 1) * longest > tokens:
            found.append([])
            longest = len(window.ids)
        found[-1].append(window)
    chance.shuffle(found)
    return found


def padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids (rows, longest), and which of them are not padding; None where all are of one length."""
    longest = max(map(len, rows))
    if all(len(row) == longest for row in rows):
        return torch.tensor(rows), None
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    seen = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        seen[index, : len(row)] = True
    return ids, seen


def train(encoder: Encoder, epoch_windows: Callable[[int], Sequence[Window]], recipe: Recipe) -> None:
    """Trains in place: the early head; then, on what this is not sure to be harmless, the late head, and with it the
    layers that are not frozen. `epoch_windows`: the windows of an epoch, drawn anew for each. Raises ValueError where
    layers under the early head would be trained after it."""
    if recipe.frozen < recipe.early:
        raise ValueError(f"{recipe.frozen} layers are frozen, and the early head stands on {recipe.early}")
    torch.manual_seed(recipe.seed)
    encoder.requires_grad_(False)

    def early(ids: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        return encoder.first(ids, seen)[1]

    def late(ids: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        return encoder(ids, seen)[1]

    def doubtful(epoch: int) -> Sequence[Window]:
        return doubted(encoder, epoch_windows(epoch), recipe, random.Random(1000 * recipe.seed + epoch))

    early_head, head = (list(part.requires_grad_(True).parameters()) for part in (encoder.early_head, encoder.head))
    _train(encoder, early, _plan(epoch_windows, recipe.early_epochs, recipe), [(early_head, recipe.probe_rate)], recipe)
    encoder.early_head.requires_grad_(False)
    _train(encoder, late, _plan(doubtful, recipe.probe_epochs, recipe), [(head, recipe.probe_rate)], recipe)
    layers = encoder.layers[recipe.frozen :].requires_grad_(True)
    rates = [(head, recipe.head_rate), (list(layers.parameters()), recipe.rate)]
    _train(encoder, late, _plan(doubtful, recipe.epochs, recipe), rates, recipe)


def doubted(encoder: Encoder, windows: Sequence[Window], recipe: Recipe, chance: random.Random) -> list[Window]:
    """What the layers after the early head are trained on: of the harmless windows, those that this head is least sure
    of, and some of the others; and all that are harmful or jailbreaks."""
    plain = [window for window in windows if not window.labels[0] and not window.labels[1]]
    plain.sort(key=lambda window: len(window.ids))
    logits: list[float] = []
    encoder.eval()
    with torch.inference_mode():
        for begin in range(0, len(plain), _TOGETHER):
            ids, seen = padded([window.ids for window in plain[begin : begin + _TOGETHER]])
            logits += encoder.first(ids, seen)[1][:, 0].tolist()
    limit = sorted(logits)[int((1 - recipe.doubtful) * len(logits))] if logits and recipe.doubtful else math.inf
    kept = [window for window in windows if window.labels[0] or window.labels[1]]
    for window, logit in zip(plain, logits, strict=True):
        if logit >= limit or chance.random() < recipe.certain:
            kept.append(window)
    return kept


def _train(
    encoder: Encoder,
    logits: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    plan: Sequence[Sequence[Window]],
    rates: Sequence[tuple[Sequence[nn.Parameter], float]],
    recipe: Recipe,
) -> None:
    groups = [{"params": parameters, "lr": rate, "weight_decay": recipe.decay} for parameters, rate in rates]
    optimiser = torch.optim.AdamW(groups)
    warm = max(1, int(recipe.warmup * len(plan)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm, max(0.0, (len(plan) - step) / max(1, len(plan) - warm)))
    )
    weights = torch.tensor([1.0, recipe.jailbreak_weight, *[recipe.category_weight] * len(CATEGORIES)])
    encoder.train()
    started, mean = time.monotonic(), 0.0
    for step, batch in enumerate(plan):
        ids, seen = padded([window.ids for window in batch])
        labels = torch.tensor([window.labels for window in batch])
        known = torch.tensor([window.known for window in batch])
        loss = nn.functional.binary_cross_entropy_with_logits(
            logits(ids, seen), labels, known * weights, reduction="sum"
        ) / len(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        mean += 0.02 * (loss.item() - mean) if step else loss.item()
        if step % 100 == 99 or step + 1 == len(plan):
            seconds = time.monotonic() - started
            print(f"step {step + 1} of {len(plan)}, loss {mean:.4f}, {seconds:.0f} s", file=sys.stderr, flush=True)
    encoder.eval()


def _plan(epoch_windows: Callable[[int], Sequence[Window]], epochs: float, recipe: Recipe) -> list[list[Window]]:
    chance = random.Random(recipe.seed)
    plan: list[list[Window]] = []
    whole, rest = int(epochs), epochs % 1
    for epoch in range(math.ceil(epochs)):
        found = batches(epoch_windows(epoch), recipe.batch_tokens, chance)
        plan += found if epoch < whole else found[: int(rest * len(found))]
    return plan
