"""Makes a drafter: cuts, lets the target answer, trains, writes, measures."""

from __future__ import annotations

import math
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from edgellm.backend.model import VocabFile, load_packed
from edgellm.errors import ConfigError, StorageError, TrainingDataError
from edgellm.models.describe import describe
from edgellm.models.ggml_types import GGML_TYPES
from edgellm.speculative.bridge import Bridge
from edgellm.speculative.ngram_cache import NgramCache
from edgellm.tune.draft.answers import answer, encode_messages, write_rows
from edgellm.tune.draft.cut import choose_layers, cut_model
from edgellm.tune.draft.distil import Course, Distiller, Look
from edgellm.tune.draft.measure import measure_drafter, measure_target
from edgellm.tune.draft.net import Net
from edgellm.tune.draft.samples import Row, Sample, hold_out, make_sample, read_rows
from edgellm.tune.draft.spec import DraftSpec
from edgellm.tune.draft.teacher import soften_all

Report = Callable[[dict[str, Any]], None]
ANSWERS = ".answers.jsonl"
"""Behind the drafter's name: what the target answered, as data for another time."""


def make_drafter(spec: DraftSpec, report: Report, stop: threading.Event) -> None:
    """Reports what happens; the last event is "done", or "stopped" if nothing was trained yet.

    Once it trains, `stop` ends it with the best weights so far, which are not measured then. Raises EdgeLLMError.
    """
    torch.set_num_threads(spec.threads)
    source, target, output = Path(spec.source), Path(spec.target), Path(spec.output)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgellm-draft-")))
        cut = folder / "cut.gguf"
        _cut(spec, source, cut, report)
        vocabulary = VocabFile(target)
        stack.callback(vocabulary.close)
        rows = read_rows(Path(spec.data), vocabulary.vocab.n_tokens)
        encode_messages(rows, vocabulary.vocab, target)
        _answer(spec, rows, report, stop)
        if stop.is_set():
            report({"event": "stopped"})
            return
        parts = _samples(rows, cut, vocabulary, spec, report, stop)
        report(_told(parts))
        first, best, net = _train(spec, cut, parts, report, stop)
        net.save(output, next(one for one in GGML_TYPES.values() if one.name == spec.type), name=output.stem)
        done: dict[str, Any] = {"event": "done", "output": str(output), "bytes": output.stat().st_size}
        done |= {"before": _plain(first), "best": _plain(best), "stopped": stop.is_set()}
        del net
        if not stop.is_set():
            files = {"whole": source, "cut": cut, "drafter": output}
            done |= _measure(spec, files, vocabulary, parts.held_rows, report)
        report(done)


def _cut(spec: DraftSpec, source: Path, cut: Path, report: Report) -> None:
    layers = choose_layers(describe(source).layers, spec.layers, spec.choice)
    try:
        cut_model(source, cut, layers=layers, vocabulary=spec.vocabulary)
    except OSError as error:
        raise StorageError(f"the cut model cannot be written: {error.strerror}") from None
    info = describe(cut)
    report({"event": "cut", "layers": layers, "vocabulary": info.vocabulary, "parameters": info.parameters})


def _answer(spec: DraftSpec, rows: list[Row], report: Report, stop: threading.Event) -> None:
    made = answer(
        rows,
        Path(spec.target),
        most_tokens=spec.answer_tokens,
        threads=spec.threads,
        report=lambda done, total: report({"event": "answers", "done": done, "total": total}),
        stopped=stop.is_set,
    )
    if made:
        path = Path(spec.output + ANSWERS)
        try:
            write_rows(path, [row for row in rows if row.answer])
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class _Parts:
    train: list[Sample]
    held: list[Sample]
    held_rows: list[Row]


def _samples(
    rows: list[Row], cut: Path, target: VocabFile, spec: DraftSpec, report: Report, stop: threading.Event
) -> _Parts:
    drafter = VocabFile(cut)
    try:
        bridge = Bridge(drafter.vocab, target.vocab, NgramCache())
        found = [(row, sample) for row in rows if (sample := make_sample(bridge, row.prompt, row.answer))]
        if len(found) < 2:
            raise TrainingDataError([(0, "has fewer than two answers to learn")], "data")
        train, held = hold_out(len(found), spec.held_share, spec.seed)
        samples = [found[one][1] for one in train]
        if spec.softness:
            samples = _soften(bridge, [found[one][0] for one in train], samples, spec, report, stop)
    finally:
        drafter.close()
    return _Parts(samples, [found[one][1] for one in held], [found[one][0] for one in held])


def _soften(
    bridge: Bridge, rows: list[Row], samples: list[Sample], spec: DraftSpec, report: Report, stop: threading.Event
) -> list[Sample]:
    target = load_packed(Path(spec.target))
    try:
        return soften_all(
            bridge,
            rows,
            samples,
            target,
            threads=spec.threads,
            report=lambda done, total: report({"event": "read", "done": done, "total": total}),
            stopped=stop.is_set,
        )
    finally:
        target.close()


def _told(parts: _Parts) -> dict[str, Any]:
    counts = {
        f"{name}_{what}": value
        for name, part in (("train", parts.train), ("held", parts.held))
        for what, value in (("answers", len(part)), ("tokens", sum(len(one.tokens) - one.start for one in part)))
    }
    return {"event": "data", **counts}


def _train(spec: DraftSpec, cut: Path, parts: _Parts, report: Report, stop: threading.Event) -> tuple[Look, Look, Net]:
    """How it was before, the best, and the net."""
    net = Net(cut, threads=spec.threads)
    course = Course(
        epochs=spec.epochs,
        time_s=spec.time_s or math.inf,
        pack_tokens=spec.pack_tokens,
        learning_rate=spec.learning_rate,
        softness=spec.softness,
        seed=spec.seed,
    )
    distiller = Distiller(net, parts.train, parts.held, course)
    first, best = distiller.run(lambda look: report({"event": "look", **_plain(look)}), stop.is_set)
    if not math.isfinite(best.loss):
        raise ConfigError("the loss is no number; a smaller --learning-rate may help")
    return first, best, net


def _plain(look: Look) -> dict[str, Any]:
    """JSON has no nan."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value for name, value in asdict(look).items()
    }


def _measure(
    spec: DraftSpec, files: dict[str, Path], target: VocabFile, rows: list[Row], report: Report
) -> dict[str, Any]:
    costs = measure_target(Path(spec.target), threads=spec.threads)
    found: dict[str, Any] = {"target": asdict(costs)}
    for name, path in files.items():
        quality = measure_drafter(path, target.vocab, rows[: spec.measured_answers], threads=spec.threads)
        more = {"break_even": costs.break_even(quality), "speed_up": costs.speed_up(quality)}
        found[name] = {**asdict(quality), "cost": quality.token_s / costs.one_s, **more}
        report({"event": "measured", "what": name, **found[name]})
    return found
