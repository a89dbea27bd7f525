"""How likely is a drafted token to be accepted? Logistic regression, fitted online to what became of earlier ones.

One for each proposer, over the few numbers with which it describes a token. It begins with weights that were fitted to
recorded answers and goes on learning; what it learned is kept on disk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_RATE = 0.1
_MEMORY = 0.999  # of the squared gradients: what counts are the last thousand tokens or so
_SMALL = 1e-3  # a number that has long been 0 may come back
_LEAST, _MOST = 0.005, 0.995
_FARTHEST = 8.0  # log-odds beyond this are not believed


class Acceptance:
    """P(accepted | the proposer's evidence)."""

    def __init__(self, weights: Sequence[float]) -> None:
        """`weights` to begin with, one for each number of the evidence, the first for the constant."""
        self.weights = list(weights)
        self._squares = [1.0] * len(self.weights)

    def probability(self, evidence: Sequence[float]) -> float:
        """Between 0.005 and 0.995. `evidence` leaves out the constant."""
        weights = self.weights
        odds = weights[0]
        for index, value in enumerate(evidence, 1):
            odds += weights[index] * value
        odds = max(-_FARTHEST, min(_FARTHEST, odds))
        return min(_MOST, max(_LEAST, 1.0 / (1.0 + math.exp(-odds))))

    def learn(self, evidence: Sequence[float], accepted: bool) -> None:
        """One step on the logistic loss, at AdaGrad's rates (Duchi et al., 2011) over a fading memory."""
        error = float(accepted) - self.probability(evidence)
        for index, value in enumerate((1.0, *evidence)):
            gradient = error * value
            square = self._squares[index] = _MEMORY * self._squares[index] + gradient * gradient
            self.weights[index] += _RATE * gradient / math.sqrt(square + _SMALL)
