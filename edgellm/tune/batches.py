"""Examples laid out for the trainer: sequences in packs of a bounded size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgellm.tune.coding import TrainingSequence
from edgellm.tune.data import TrainingSet
from edgellm.tune.packing import assign
from edgellm.tune.prefix_tree import Packed, pack


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Examples of one sequence each, or of two: a preferred answer and a rejected one, in this order."""

    sequences: tuple[TrainingSequence, ...]
    width: int  # sequences of an example, 1 or 2

    @staticmethod
    def of(found: TrainingSet) -> Examples:
        """Those of a file."""
        if found.pairs:
            return Examples(tuple(one for pair in found.pairs for one in (pair.preferred, pair.rejected)), 2)
        return Examples(found.sequences, 1)

    def __len__(self) -> int:
        return len(self.sequences) // self.width

    def members(self, examples: Sequence[int]) -> list[int]:
        """The numbers of these examples' sequences."""
        return [example * self.width + part for example in examples for part in range(self.width)]

    def packs(self, examples: Sequence[int], most_tokens: int) -> list[list[int]]:
        """Sequences of these examples, shared out so that each pack has about `most_tokens` tokens, more only where a
        single example has; an example is never divided. Few packs, and the same for the same examples."""
        sizes = [sum(len(self.sequences[member].tokens) for member in self.members([one])) for one in examples]
        packs = assign(sizes, max(most_tokens, *sizes))
        return [self.members([examples[index] for index in pack]) for pack in packs]

    def batch(self, members: Sequence[int]) -> Batch:
        """These sequences as one pack."""
        return Batch.of([self.sequences[member] for member in members])


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A pack of sequences, and what is to be learnt of it."""

    packed: Packed
    tokens: int  # of its sequences; the pack has fewer where they begin alike
    places: Tensor  # (n,), int64: where the next token is learnt
    targets: Tensor  # (n,), int64: those tokens
    owners: Tensor  # (n,), int64: which of the pack's sequences each belongs to

    @staticmethod
    def of(sequences: Sequence[TrainingSequence]) -> Batch:
        """Of packed sequences. Nothing of a first token is learnt: nothing of its sequence precedes it."""
        packed = pack([sequence.tokens for sequence in sequences])
        places, targets, owners = [], [], []
        for number, sequence in enumerate(sequences):
            learnt = np.flatnonzero(sequence.mask[1:]) + 1
            places.append(packed.rows(number)[torch.from_numpy(learnt - 1)])
            targets.append(torch.from_numpy(sequence.tokens[learnt].astype(np.int64)))
            owners.append(torch.full((len(learnt),), number))
        tokens = sum(len(sequence.tokens) for sequence in sequences)
        return Batch(packed, tokens, torch.cat(places), torch.cat(targets), torch.cat(owners))
