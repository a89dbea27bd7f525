"""One adaptation of a drafter to what its target wrote, from the buffer to an adapter that is measurably better.

OmniDraft's online adaptation (arXiv 2507.02659, section 3.2), with two differences: it is done when nobody waits for
an answer, by a process of its own, and an adapter that does not prove itself on answers held out is dropped.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from edgellm.backend.model import VocabFile, load_packed
from edgellm.backend.vocab import Vocab
from edgellm.errors import StorageError
from edgellm.models.files import publish
from edgellm.speculative.bridge import Bridge
from edgellm.speculative.buffer import AnswerBuffer, Record
from edgellm.speculative.drafter import load_drafter
from edgellm.speculative.ngram_cache import NgramCache, vocabulary_fingerprint
from edgellm.speculative.places import merged_path
from edgellm.speculative.replay import Replay, replay
from edgellm.tune.adaptation_spec import AdaptationSpec
from edgellm.tune.adapter_read import read_adapter
from edgellm.tune.decoder import Decoder
from edgellm.tune.defaults import ALPHA_RANKS
from edgellm.tune.distillation import Distiller
from edgellm.tune.drafted import DraftedAnswer, direct_tokens, drafted
from edgellm.tune.export import export_adapter
from edgellm.tune.held_out import divide
from edgellm.tune.lora import Lora, LoraConfig
from edgellm.tune.merge import merge_adapter
from edgellm.tune.scheme import parse_scheme
from edgellm.tune.teacher import Likeliest, Teacher, as_written, longest_of
from edgellm.tune.weights import BaseWeights, compute_type

Report = Callable[[dict[str, Any]], None]
_NEW = "new.gguf"


class Ways(Protocol):
    """How to write so that the process may end at any time: edgellm/tune/giving_way.py."""

    def folder(self, path: Path) -> AbstractContextManager[Path]:
        """A new folder for what is not done yet."""

    def writing(self) -> AbstractContextManager[None]:
        """Not to be ended meanwhile."""

    def settle(self) -> None:
        """Not to be ended any more: the end is near."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of it. Acceptance is None where it was not measured."""

    accepted: bool  # the adapter lies at `output`, the drafter with it beside; else nothing was written
    reason: str
    records: int  # in the buffer
    held_out: int  # of these, that it was measured on
    trained: int  # and trained on
    steps: int = 0
    acceptance_without: float | None = None  # any adapter
    acceptance_before: float | None = None  # with the earlier adapter, if there is one and it is better than none
    acceptance_after: float | None = None  # with the new one
    tokens_per_call_before: float | None = None
    tokens_per_call_after: float | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_rss_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def is_better(before: Replay, after: Replay, margin: float) -> bool:
    """Whether an adapter is worth having: more is accepted, and not because less is drafted."""
    return after.acceptance >= before.acceptance + margin and after.tokens_per_call > before.tokens_per_call


def adapt(spec: AdaptationSpec, report: Report, ways: Ways) -> Result:
    """Trains, measures, and publishes what is better. `report` is told what happens, as dictionaries with an "event".

    Raises what reading models raises, AdapterError, StorageError, BackendError; MemoryError or torch's RuntimeError
    where memory runs out.
    """
    torch.set_num_threads(spec.threads)
    torch.manual_seed(spec.seed)
    return _Adaptation(spec, report, ways).run()


class _Adaptation:
    """The steps of `adapt`."""

    def __init__(self, spec: AdaptationSpec, report: Report, ways: Ways) -> None:
        self._spec, self._report, self._ways = spec, report, ways
        self._started, self._cpu = time.monotonic(), time.process_time()

    def run(self) -> Result:
        spec = self._spec
        with ExitStack() as stack:
            target = VocabFile(spec.target)
            stack.callback(target.close)
            records = _sound(AnswerBuffer(spec.buffer, vocabulary_fingerprint(target.vocab)).read(), target.vocab)
            training, held_out = divide(records)
            training, held_out = training[-spec.answers :], held_out[-spec.measured :]
            self._counts = {"records": len(records), "held_out": len(held_out), "trained": len(training)}
            self._report({"event": "data", **self._counts})
            if not held_out or len(training) < spec.batch_size:
                return self._result(False, "there are too few answers to learn from and to measure on")
            answers = self._answers(target.vocab, training)
            if not answers:
                return self._result(False, "no token of the target's answers is one of the drafter's")
            try:
                work = stack.enter_context(self._ways.folder(spec.output.parent / f".{spec.output.name}.adapting"))
            except OSError as error:
                raise StorageError(f"the adapter cannot be written: {error.strerror}") from None
            steps = self._train(answers, work / _NEW)
            return self._judge(target.vocab, held_out, work, steps)

    def _answers(self, target: Vocab, training: Sequence[Record]) -> list[DraftedAnswer]:
        """The records as the drafter learns them."""
        spec, found = self._spec, []
        with closing(VocabFile(spec.drafter)) as mine, self._teacher(training) as likeliest:
            bridge = Bridge(mine.vocab, target, NgramCache())
            to_drafter = direct_tokens(bridge)
            for number, record in enumerate(training, 1):
                found.append(drafted(bridge, record, likeliest(record), to_drafter, most_tokens=spec.row_tokens))
                self._report({"event": "asked", "record": number, "records": len(training)})
        return [answer for answer in found if answer is not None]

    @contextmanager
    def _teacher(self, training: Sequence[Record]) -> Iterator[Callable[[Record], Likeliest]]:
        """Says what the target held likely."""
        spec = self._spec
        if not spec.top:
            yield as_written
            return
        target = load_packed(spec.target)
        try:
            with Teacher(target, longest=longest_of(training), threads=spec.threads, top=spec.top) as teacher:
                yield teacher.likeliest
        finally:
            target.close()

    def _train(self, answers: Sequence[DraftedAnswer], path: Path) -> int:
        """Writes the trained adapter to `path`; how many steps there were."""
        spec = self._spec
        weights = BaseWeights(spec.drafter, threads=spec.threads)
        decoder = Decoder(weights, dtype=compute_type(), recompute=spec.recompute)
        lora = self._lora(decoder)
        distiller = Distiller(
            decoder,
            lora,
            answers,
            epochs=spec.epochs,
            batch_size=spec.batch_size,
            learning_rate=spec.learning_rate,
            seed=spec.seed,
        )
        parameters = sum(tensor.numel() for tensor in lora.parameters())
        self._report({"event": "begun", "steps": distiller.total_steps, "parameters": parameters})
        for step in distiller.steps():
            seconds = round(time.monotonic() - self._started, 3)
            self._report({"event": "step", **asdict(step), "seconds": seconds})
        try:
            with self._ways.writing():
                export_adapter(lora, spec.drafter, path)
                path.chmod(0o600)  # answers can be guessed from it
        except OSError as error:
            raise StorageError(f"the adapter cannot be written: {error.strerror}") from None
        return distiller.total_steps

    def _lora(self, decoder: Decoder) -> Lora:
        spec = self._spec
        if spec.earlier is not None:
            return read_adapter(spec.earlier, decoder.shape)
        sites = parse_scheme(spec.sparsity, decoder.shape.layers)
        return Lora(decoder.shape, sites, LoraConfig(spec.rank, ALPHA_RANKS * spec.rank), seed=spec.seed)

    def _judge(self, target: Vocab, held_out: Sequence[Record], work: Path, steps: int) -> Result:
        """Measures models with the adapters in their weights: those are what drafts."""
        spec, new, merged = self._spec, work / _NEW, merged_path(work / _NEW)
        without = before = self._measure("none", spec.drafter, target, held_out)
        try:
            if spec.earlier is not None:
                self._merge(spec.earlier, merged)
                earlier = self._measure("earlier", merged, target, held_out)
                before = max(without, earlier, key=lambda one: one.acceptance)
            self._merge(new, merged)
            after = self._measure("new", merged, target, held_out)
            better = is_better(before, after, spec.margin)
            if better:
                self._ways.settle()  # an adapter that is there is also told of
                publish(merged, merged_path(spec.output))
                publish(new, spec.output)
        except OSError as error:
            raise StorageError(f"the adapter cannot be written: {error.strerror}") from None
        return self._result(
            better,
            "it drafts better than before" if better else "it does not draft better than before, by the margin",
            steps=steps,
            acceptance_without=without.acceptance,
            acceptance_before=before.acceptance,
            acceptance_after=after.acceptance,
            tokens_per_call_before=before.tokens_per_call,
            tokens_per_call_after=after.tokens_per_call,
        )

    def _merge(self, adapter: Path, merged: Path) -> None:
        with self._ways.writing():
            merge_adapter(self._spec.drafter, adapter, merged, threads=self._spec.threads)
            merged.chmod(0o600)

    def _measure(self, which: str, path: Path, target: Vocab, records: Sequence[Record]) -> Replay:
        with closing(load_drafter(path, target, threads=self._spec.threads)) as drafter:
            found = sum(replay(drafter, records, most=self._spec.drafts), Replay())
        told = {"acceptance": found.acceptance, "tokens_per_call": found.tokens_per_call}
        self._report({"event": "measured", "adapter": which, **told})
        return found

    def _result(self, accepted: bool, reason: str, **numbers: Any) -> Result:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return Result(
            accepted,
            reason,
            **self._counts,
            **numbers,
            seconds=round(time.monotonic() - self._started, 3),
            cpu_seconds=round(time.process_time() - self._cpu, 3),
            peak_rss_bytes=peak if sys.platform == "darwin" else peak << 10,
        )


def _sound(records: Sequence[Record], vocab: Vocab) -> list[Record]:
    """Those whose tokens the target has."""
    return [one for one in records if max(one.prompt + one.answer) < vocab.n_tokens]
