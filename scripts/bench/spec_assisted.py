"""Runs Hugging Face's assisted generation for scripts/bench_spec on the prompts that the servers got."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.client import BenchError
from bench.servers import machine_cpu_s
from bench.spec_runs import Counts

_WORKER = Path(__file__).with_name("spec_rival.py")
_LOG_TAIL = 3000


@dataclass(frozen=True)
class Assisted:
    """One prompt, answered by transformers with its assistant and without. Seconds hold the reading of the prompt."""

    workload: str
    plain_s: float
    plain_tokens: int
    assisted_s: float
    assisted_tokens: int
    calls: int  # of the model, with the assistant
    drafted: int
    same: bool  # both texts

    @property
    def ratio(self) -> float:
        """Tokens a second with the assistant over those without."""
        return (self.assisted_tokens / self.assisted_s) / (self.plain_tokens / self.plain_s)

    @property
    def drafts(self) -> Counts:
        accepted = max(0, self.assisted_tokens - self.calls)
        return Counts(accepted, max(0, self.drafted - accepted))


@dataclass(frozen=True)
class AssistedRun:
    answers: tuple[Assisted, ...]
    others_cores: float  # that anything else on the machine kept busy meanwhile


def run(python: Path, task: dict[str, Any], workloads: Sequence[str]) -> AssistedRun:
    """`task` is the worker's (see bench/spec_rival.py); `workloads` names that of each prompt. Raises BenchError."""
    found: dict[tuple[int, bool], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-spec-") as folder:
        file, log = Path(folder) / "task.json", Path(folder) / "log"
        file.write_text(json.dumps(task))
        busy_s, own_s, begun_s = machine_cpu_s(), _children_cpu_s(), os.times().elapsed
        with log.open("wb") as sink:
            command = [str(python), str(_WORKER), str(file)]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=sink, text=True, stdin=subprocess.DEVNULL
            )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith('{"event": "answer"'):
                    event = json.loads(line)
                    found[event["index"], event["assisted"]] = event
                    print(f"transformers: {len(found)} of {2 * len(workloads)}", file=sys.stderr, flush=True)
            status = process.wait()
        finally:
            process.kill()
            process.communicate()
        if status:
            raise BenchError(f"{python} ended with {status}:\n{log.read_text(errors='replace')[-_LOG_TAIL:]}")
    wall_s = os.times().elapsed - begun_s
    others = max(0.0, machine_cpu_s() - busy_s - (_children_cpu_s() - own_s)) / wall_s
    answers = [_pair(name, found[index, False], found[index, True]) for index, name in enumerate(workloads)]
    return AssistedRun(tuple(answers), others)


def _pair(workload: str, plain: dict[str, Any], assisted: dict[str, Any]) -> Assisted:
    return Assisted(
        workload,
        plain["seconds"],
        plain["tokens"],
        assisted["seconds"],
        assisted["tokens"],
        assisted["calls"],
        assisted["drafted"],
        plain["text"] == assisted["text"],
    )


def speeds(answers: Sequence[Assisted]) -> tuple[float, float]:
    """Tokens a second over all answers: (without, with)."""
    plain = sum(one.plain_tokens for one in answers) / sum(one.plain_s for one in answers)
    return plain, sum(one.assisted_tokens for one in answers) / sum(one.assisted_s for one in answers)


def median_ratio(answers: Sequence[Assisted]) -> float:
    """Of the answers' ratios."""
    return statistics.median(one.ratio for one in answers)


def _children_cpu_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
