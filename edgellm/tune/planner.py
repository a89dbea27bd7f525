"""From a run's order to a plan: analyses the model if need be, and chooses what is trained."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgellm.errors import ConfigError
from edgellm.models.files import write_atomic
from edgellm.tune.batches import Examples
from edgellm.tune.contribution import Gains, analyse
from edgellm.tune.cost import layer_work
from edgellm.tune.decoder import Decoder
from edgellm.tune.defaults import Hyperparameters
from edgellm.tune.lora import LoraConfig
from edgellm.tune.plan import Candidate, Load, candidates, choose, fit, fits, price, too_small
from edgellm.tune.scheme import Site, parse_scheme
from edgellm.tune.spec import RunSpec

Report = Callable[[dict[str, Any]], None]
_VERSION = 1
_ANALYSIS_PACK = 1024  # tokens: about half the memory of training every matrix in packs of 2048
_THRIFTY_PACK = 512  # the same where memory is limited


@dataclass(frozen=True, slots=True)
class Planned:
    """What is trained, and how."""

    scheme: str
    pack_tokens: int
    recompute: bool
    parameters: int
    memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    @staticmethod
    def of(found: Candidate) -> Planned:
        """The plan that trains a candidate."""
        setting = found.setting
        return Planned(found.text, setting.pack_tokens, setting.recompute, found.parameters, found.memory_bytes)


@dataclass(frozen=True, slots=True)
class Analysis:
    """What is known of a model: the gain of each matrix, and how fast this machine is with it."""

    gains: Gains
    work_per_s: float  # multiply-adds a second

    def write(self, path: Path) -> None:
        """Raises OSError."""
        body = {
            "version": _VERSION,
            "work_per_s": self.work_per_s,
            "gains": [[site.layer, site.tensor, gain] for site, gain in sorted(self.gains.items())],
        }
        write_atomic(path, json.dumps(body).encode())

    @staticmethod
    def read(path: Path, layers: int) -> Analysis | None:
        """None if there is none of such a model, or it is unsound."""
        try:
            body = json.loads(path.read_bytes())
            gains = {Site(int(layer), str(tensor)): float(gain) for layer, tensor, gain in body["gains"]}
            speed = float(body["work_per_s"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        sound = body.get("version") == _VERSION and speed > 0 and set(gains) == set(parse_scheme("none", layers))
        return Analysis(gains, speed) if sound else None


def make_plan(spec: RunSpec, decoder: Decoder, examples: Examples, numbers: Hyperparameters, report: Report) -> Planned:
    """Raises ConfigError for a scheme that the model has not, or a budget that nothing fits."""
    load = _load(examples, numbers)
    item, budget = decoder.dtype.itemsize, spec.memory_budget_bytes
    if spec.sparsity != "auto":
        sites = parse_scheme(spec.sparsity, decoder.shape.layers)
        setting = fit(decoder.shape, sites, load, numbers.rank, item, budget)
        found = price(decoder.shape, sites, setting, load, 1.0)
        if not fits(found.memory_bytes, budget):
            raise ConfigError(too_small(found.memory_bytes, budget))
        if not spec.only_plan:
            return Planned.of(found)
    analysis = _analysis(spec, decoder, examples, numbers, report)
    several = candidates(decoder.shape, analysis.gains, load, numbers.rank, item, budget)
    most = None if spec.time_budget_s is None else spec.time_budget_s * analysis.work_per_s
    if spec.only_plan:
        for site, gain in sorted(analysis.gains.items()):
            report({"event": "contribution", "layer": site.layer, "tensor": site.tensor, "gain": gain})
    chosen = choose(several, budget, most) if spec.sparsity == "auto" else found
    if spec.only_plan:
        _tell(analysis, several if chosen in several else [*several, chosen], chosen, report)
    return Planned.of(chosen)


def _load(examples: Examples, numbers: Hyperparameters) -> Load:
    sizes = [len(sequence.tokens) for sequence in examples.sequences]
    answers = sum(sequence.trained_tokens for sequence in examples.sequences)
    longest = max(sum(sizes[first : first + examples.width]) for first in range(0, len(sizes), examples.width))
    return Load(sum(sizes), answers / max(1, sum(sizes)), longest, numbers.epochs)


def _analysis(
    spec: RunSpec, decoder: Decoder, examples: Examples, numbers: Hyperparameters, report: Report
) -> Analysis:
    """The one that is kept for the model, or a new one, which is then kept. A plan asked for by itself is made anew."""
    path = None if spec.analysis is None else Path(spec.analysis)
    if path is not None and not spec.only_plan and (kept := Analysis.read(path, decoder.shape.layers)) is not None:
        return kept
    report({"event": "analysing"})
    config = LoraConfig(numbers.rank, numbers.alpha, spec.rank_stabilised)
    thrifty = spec.memory_budget_bytes is not None
    pack = _THRIFTY_PACK if thrifty else _ANALYSIS_PACK
    started = time.monotonic()
    found = analyse(decoder, examples, config, pack_tokens=pack, recompute=thrifty, seed=spec.seed)
    seconds = max(1e-6, time.monotonic() - started)
    # Each layer is gone through forwards, once or twice, and backwards.
    work = (3 if thrifty else 2) * decoder.shape.layers * layer_work(
        decoder.shape
    ) + 2 * decoder.shape.vocabulary * decoder.shape.width
    analysis = Analysis(found.gains, found.tokens * work / seconds)
    if path is not None:
        try:
            analysis.write(path)
        except OSError as error:
            report({"event": "notice", "line": 0, "message": f"the analysis cannot be kept: {error.strerror}"})
    return analysis


def _tell(analysis: Analysis, found: list[Candidate], chosen: Candidate, report: Report) -> None:
    for one in found:
        layers = sorted({site.layer for site in one.sites})
        report(
            {
                "event": "scheme",
                "text": one.text,
                "layers": [layers[0], layers[-1]],
                "sites": len(one.sites),
                "parameters": one.parameters,
                "memory_bytes": one.memory_bytes,
                "seconds": one.work / analysis.work_per_s,
                "share": one.share,
                "recompute": one.setting.recompute,
                "chosen": one is chosen,
            }
        )
