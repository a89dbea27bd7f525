"""The ways of tuning that scripts/bench_tune compares, and how each is run."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench import tune_data
from bench.client import BenchError
from bench.tune_data import Rows
from bench.tune_runs import Point, Run, watch
from edgellm.models.gguf import read_header
from edgellm.models.split import split_headers
from edgellm.tune.architecture import Architecture, read_architecture
from edgellm.tune.defaults import learning_rate
from edgellm.tune.schedule import learning_rate_at, step_examples
from edgellm.tune.scheme import parse_scheme
from edgellm.tune.spec import RunSpec

WAYS = {
    "ours": "edgellm, sparse",
    "full": "edgellm, every matrix",
    "a": "PEFT, every matrix",
    "b": "PEFT, our matrices",
    "c": "TRL, its defaults",
}
RATES = {"ours": 2e-3, "full": 2e-3, "a": 2e-3, "b": 2e-3, "c": 1e-3}
"""Where nothing else is asked for."""

_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PROBE_STEPS = 4  # the first is not counted
_RIVAL = Path(__file__).with_name("tune_rival.py")


@dataclass(frozen=True)
class Setting:
    """What all ways have in common."""

    model: Path
    source: Path  # of the rows
    rows: int
    validation_rows: int
    epochs: int
    batch_size: int
    row_tokens: int
    rank: int
    sparsity: str
    memory_budget_bytes: int | None
    validations_per_epoch: int
    threads: int
    seed: int

    @property
    def alpha(self) -> float:
        return 2.0 * self.rank


class Bench:
    """Runs ways in a folder, where results of runs that were finished before are found again."""

    def __init__(self, setting: Setting, python: Path | None, folder: Path, dtype: str) -> None:
        self.setting = setting
        self._python = python
        self._folder = folder
        self._dtype = dtype
        self._scheme: str | None = None if setting.sparsity == "auto" else setting.sparsity
        self.rows = self._rows()

    def _rows(self) -> Rows:
        one = self.setting
        counts = (one.rows, one.validation_rows)
        folder = self._folder / "data" / _key([str(one.source), str(one.model), *counts, one.row_tokens])
        return tune_data.make_rows(one.source, one.model, folder, counts, one.row_tokens)

    def subset(self, rows: int, epochs: int) -> Bench:
        """The same with fewer rows and epochs."""
        smaller = replace(self.setting, rows=rows, epochs=epochs, validations_per_epoch=1)
        bench = Bench(smaller, self._python, self._folder, self._dtype)
        bench._scheme = self._scheme
        return bench

    def run(self, way: str, rate: float) -> Run:
        """Raises BenchError."""
        return self._ours(way, rate) if way in ("ours", "full") else self._rival(way, rate)

    def _ours(self, way: str, rate: float) -> Run:
        one = self.setting
        given: dict[str, Any] = {
            "model": str(one.model),
            "data": str(self.rows.training),
            "validation": str(self.rows.validation),
            "output": str(self._folder / f"{way}.gguf"),
            "epochs": one.epochs,
            "batch_size": one.batch_size,
            "rank": one.rank,
            "alpha": one.alpha,
            "sparsity": "none" if way == "full" else one.sparsity,
            "memory_budget_bytes": one.memory_budget_bytes,
            "row_tokens": one.row_tokens,
            "seed": one.seed,
            "threads": one.threads,
            "validations_per_epoch": one.validations_per_epoch,
        }
        given["learning_rate_multiplier"] = rate / learning_rate(RunSpec(**given), self._shape().width)
        run = self._finished(way, [sys.executable, "-m", "edgellm.tune"], given)
        if way == "ours":
            self._scheme = run.plan["sparsity"]
        return run

    def _rival(self, way: str, rate: float) -> Run:
        return self._watch_rival(way, self._task(way, rate) | {"dtype": self.dtype(way)})

    def _task(self, way: str, rate: float) -> dict[str, Any]:
        one = self.setting
        task = {
            "kind": "trl" if way == "c" else "trainer",
            "model": str(self._base()),
            "tokens": str(self.rows.tokens),
            "scratch": str(self._folder / "scratch"),
            "rate": rate,
            "epochs": one.epochs,
            "threads": one.threads,
            "seed": one.seed,
            "validations": one.epochs * one.validations_per_epoch,
        }
        if way == "c":
            return task
        steps = one.epochs * -(-self.rows.count // one.batch_size)
        rows = {"count": self.rows.count, "batch_size": one.batch_size, "seed": one.seed}
        return task | {
            "rank": one.rank,
            "alpha": one.alpha,
            "modules": "all-linear" if way == "a" else self._modules(),
            "batches": [step_examples(step, **rows) for step in range(steps)],
            "rates": [learning_rate_at(step, steps=steps, height=rate) for step in range(steps)],
        }

    def dtype(self, way: str) -> str:
        """What a way computes in; for a and b that of float32 and bfloat16 which is faster here, by a few steps."""
        if way in ("ours", "full"):
            from edgellm.tune.weights import compute_type  # loads torch

            return str(compute_type()).removeprefix("torch.")
        if way == "c":
            return "its default"
        if self._dtype != "auto":
            return self._dtype
        seconds = {}
        for dtype in ("float32", "bfloat16"):
            task = self._task(way, 1e-4) | {"dtype": dtype, "validations": 0}
            task["batches"] = task["batches"][:_PROBE_STEPS]
            seconds[dtype] = statistics.median(self._watch_rival(f"{way}-{dtype}", task).step_s[1:] or [math.inf])
        print(f"{way}: s/step of the probe {seconds}", file=sys.stderr, flush=True)
        return min(seconds, key=lambda dtype: seconds[dtype])

    def _base(self) -> Path:
        """The model's file, dequantised by transformers, once."""
        folder = self._folder / "base" / _key([str(self.setting.model)])
        if not (folder / "config.json").is_file():
            task = {"kind": "convert", "gguf": str(self.setting.model), "model": str(folder), "threads": 1, "seed": 0}
            self._watch_rival("convert", task)
        return folder

    def _modules(self) -> list[str]:
        """What the rivals' library calls the matrices that ours trained."""
        if self._scheme is None:
            raise BenchError("b trains the matrices that ours chose: run ours as well, or say --sparsity SCHEME")
        sites = parse_scheme(self._scheme, self._shape().layers)
        return [f"layers.{site.layer}.{_MODULES[site.tensor]}" for site in sites]

    def _shape(self) -> Architecture:
        return read_architecture(split_headers(read_header(self.setting.model)))

    def _watch_rival(self, name: str, task: dict[str, Any]) -> Run:
        if self._python is None:
            raise BenchError("--python PATH is missing: of an environment with transformers, peft, trl, gguf and torch")
        return self._finished(name, [str(self._python), str(_RIVAL)], task)

    def _finished(self, name: str, command: list[str], given: dict[str, Any]) -> Run:
        """The result that is kept of the same run, or that of a new one."""
        text = json.dumps(given)
        kept = self._folder / "runs" / f"{name}-{_key([*command, text])}.json"
        if kept.is_file():
            body = json.loads(kept.read_text())
            return Run(**body | {"points": [Point(**point) for point in body["points"]]})
        kept.parent.mkdir(parents=True, exist_ok=True)
        argument = text
        if command[1:] == [str(_RIVAL)]:
            argument = str(kept.with_suffix(".task"))
            Path(argument).write_text(text)
        print(f"{name}: runs", file=sys.stderr, flush=True)
        run = watch([*command, argument], kept.with_suffix(".log"), _environment(self.setting.threads))
        kept.write_text(json.dumps(asdict(run)))
        return run


def _environment(threads: int) -> dict[str, str]:
    mine = ("EDGELLM_", "OMP_", "GOMP_", "MKL_", "HF_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return clean | offline | {"OMP_NUM_THREADS": str(threads)}


def _key(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
