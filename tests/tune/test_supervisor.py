"""Who runs the jobs: with a program in the trainer's place where its words must be fixed, and with the real one."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgellm.errors import ModelNotFoundError, StorageError
from edgellm.models.files import sha256_file
from edgellm.models.store import AdapterStore
from edgellm.tune import supervisor as supervisor_module
from edgellm.tune.database import Database
from edgellm.tune.files import FileStore
from edgellm.tune.job_types import Job, JobRequest
from edgellm.tune.jobs import JobStore
from edgellm.tune.ownership import Ownership
from edgellm.tune.process import TRAINER
from edgellm.tune.served import TunedAdapter, TunedModels
from edgellm.tune.supervisor import Supervisor
from tests.serving.server import wait_until
from tests.support.tiny_gguf import write_tiny_llama, write_tiny_lora

# A trainer of no model: its steps are waits, its adapter is a copy. `{do}` is run before each step.
TRAINER_SOURCE = """
import json, os, pathlib, select, shutil, signal, sys, time
spec = json.loads(sys.argv[1])
state = pathlib.Path(spec["state"])
STEPS, EPOCH = {steps}, 2
def tell(event, **facts): print(json.dumps(dict(event=event, **facts)), flush=True)
def write(path, text):
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)
def attempt():
    path = state.parent.parent / "attempts"
    count = int(path.read_text()) + 1 if path.exists() else 1
    write(path, str(count))
    return count
attempt = attempt()
def stop_asked(): return bool(select.select([sys.stdin], [], [], 0.002)[0])
saved = state / "step"
done = int(saved.read_text()) if saved.exists() else 0
tell("data", examples=12, tokens=99, answer_tokens=33, cut=1, left_out=0)
tell("notice", line=3, message="cut from 600 to 512 tokens")
tell("plan", layers=[1, 2], sites=3, parameters=96, sparsity="top-2", epochs=spec["epochs"] or 3, batch_size=4,
     learning_rate=1e-3, learning_rate_multiplier=1.0, rank=8, alpha=16, memory_bytes=5 << 20, recompute=False)
tell("begun", steps=STEPS, step=done, steps_per_epoch=EPOCH)
for step in range(done + 1, STEPS + 1):
    {do}
    tell("step", step=step, epoch=step / EPOCH, loss=float("nan") if step == 1 else 2.0 / step, accuracy=0.5, tokens=7,
         all_tokens=20, learning_rate=1e-3, seconds=0.5, memory_bytes=1 << 20)
    stop = stop_asked()
    if step % EPOCH == 0 or stop:
        adapter = None
        if step % EPOCH == 0:
            adapter = str(state / f"adapter-{{step}}.gguf")
            shutil.copy(state.parent.parent / "made.gguf", adapter)
            tell("validation", step=step, loss=1.0, accuracy=0.6)
        write(saved, str(step))
        tell("checkpoint", step=step, loss=2.0 / step, accuracy=0.5, valid_loss=1.0, valid_accuracy=0.6,
             adapter=adapter)
    if stop and step < STEPS:
        tell("stopped", step=step)
        sys.exit()
shutil.copy(state.parent.parent / "made.gguf", spec["output"])
metrics = spec["output"][:-5] + ".csv"
pathlib.Path(metrics).write_text("step,train_loss\\n")
tell("done", adapter=spec["output"], metrics=metrics, trained_tokens=7 * STEPS, steps=STEPS)
"""


class Models:
    """One model, and the adapters that were made known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.published: dict[str, TunedAdapter] = {}

    def base(self, name: str) -> Path:
        if name != "base":
            raise ModelNotFoundError(f"no {name}")
        return self.path

    def publish(self, adapter: TunedAdapter) -> None:
        assert adapter.path.is_file()
        self.published[adapter.name] = adapter

    def withdraw(self, name: str) -> None:
        self.published.pop(name, None)


class Rig:
    """A state directory with a model and a training file, and one supervisor after another."""

    def __init__(self, home: Path, model: Path) -> None:
        self.home = home
        self.database = Database(home)
        self.jobs, self.files = JobStore(self.database), FileStore(self.database)
        self.model = home / "model.gguf"
        os.link(model, self.model) if not self.model.exists() else None
        write_tiny_lora(home / "made.gguf", self.model)
        self.served = Models(self.model)
        self.store = AdapterStore(home)
        self.tuned = TunedModels(self.store, self.served)
        lines = [
            {
                "messages": [
                    {"role": "user", "content": f"hello {n}"},
                    {"role": "assistant", "content": "the world is true"},
                ]
            }
            for n in range(12)
        ]
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        self.file = self.files.add(data, "train.jsonl", "fine-tune")
        self.supervisor: Supervisor | None = None

    def job(self, **given: Any) -> Job:
        facts: dict[str, Any] = {
            "model": "base",
            "training_file": self.file.id,
            "validation_file": None,
            "seed": 1,
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto"}}},
            "suffix": "try",
            "model_sha256": sha256_file(self.model),
        }
        return self.jobs.create(JobRequest(**facts | given), validated=True)

    def run(self, do: str = "pass", steps: int = 8, command: tuple[str, ...] | None = None) -> Supervisor:
        source = TRAINER_SOURCE.format(do=do, steps=steps)
        self.supervisor = Supervisor(
            self.home,
            self.jobs,
            self.files,
            self.tuned,
            self.served,
            command=command or (sys.executable, "-c", source),
        )
        self.supervisor.start()
        return self.supervisor

    def until(self, job: Job, *statuses: str) -> Job:
        wait_until(lambda: self.jobs.get(job.id).status in statuses, f"{statuses}")
        return self.jobs.get(job.id)

    def until_step(self, job: Job, step: int) -> None:
        wait_until(lambda: any(f"Step {step}/" in text for text in self.said(job)), f"step {step}")

    def said(self, job: Job) -> list[str]:
        return [event.message for event in reversed(self.jobs.events(job.id, limit=1000).items)]

    @property
    def folders(self) -> list[str]:
        return sorted(path.name for path in (self.home / "tuning").glob("ftjob-*"))

    def until_swept(self) -> None:
        wait_until(lambda: not self.folders, "what the job needed is removed")

    def names(self) -> list[str]:
        return [stored.name for stored in self.store.list()]

    def end(self) -> None:
        if self.supervisor is not None:
            self.supervisor.close(30)
            self.supervisor = None

    @property
    def process(self) -> int | None:
        process = self.supervisor._slot._process if self.supervisor else None
        return process.pid if process else None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "model.gguf")


@pytest.fixture(autouse=True)
def torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program in the trainer's place needs none."""
    monkeypatch.setattr(supervisor_module, "torch_missing", lambda: False)


@pytest.fixture
def rig(tmp_path: Path, model: Path) -> Iterator[Rig]:
    made = Rig(tmp_path, model)
    yield made
    made.end()
    made.database.close()


def named(job: Job, step: int | None = None) -> str:
    base = f"ft:base:local:try:{job.id[6:14]}"
    return base if step is None else f"{base}:ckpt-step-{step}"


def test_a_job_from_beginning_to_end(rig: Rig) -> None:
    job = rig.job()
    rig.run()
    ended = rig.until(job, "succeeded", "failed")
    progress = ended.progress
    assert (ended.status, progress.fine_tuned_model, progress.trained_tokens) == ("succeeded", named(job), 56)
    assert progress.hyperparameters == {
        "n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 1.0, "lora_rank": 8, "sparsity": "top-2",
    }  # fmt: skip
    assert progress.estimated_finish is None
    [result] = progress.result_files
    assert rig.files.get(result).filename == "step_metrics.csv"
    assert rig.files.path(result).read_bytes() == b"step,train_loss\n"
    assert rig.files.get(result).purpose == "fine-tune-results"
    rig.until_swept()
    kept = [named(job), *(named(job, step) for step in (4, 6, 8))]
    assert sorted(rig.names()) == sorted(kept) == sorted(rig.served.published)
    found = rig.jobs.checkpoints(job.id).items
    assert [(one.step, one.model) for one in found] == [(step, named(job, step)) for step in (8, 6, 4)]
    assert (rig.home / found[0].path).is_file()
    assert found[0].metrics["full_valid_loss"] == found[0].metrics["valid_loss"] == 1.0
    assert rig.store.facts(rig.store.find(named(job)).path)["job"] == job.id


def test_events_are_as_openai_has_them(rig: Rig) -> None:
    job = rig.job()
    rig.run(steps=2)
    rig.until(job, "succeeded")
    events = {event.message: event for event in rig.jobs.events(job.id, limit=100).items}
    step = events["Step 2/2: training loss=1.00"]
    assert (step.type, step.level) == ("metrics", "info")
    assert step.data == {
        "step": 2, "train_loss": 1.0, "train_mean_token_accuracy": 0.5, "total_steps": 2, "epoch": 1.0,
        "learning_rate": 1e-3, "tokens_per_second": 40.0, "memory_bytes": 1 << 20,
    }  # fmt: skip
    assert events["Step 1/2: training loss=nan"].data["train_loss"] is None
    assert events["Step 2/2: full validation loss=1.00"].data["full_valid_loss"] == 1.0
    assert events["Line 3: cut from 600 to 512 tokens"].level == "warn"
    assert "Training on 12 examples, 33 of their tokens to be learnt; 1 cut to the training length" in events


def test_jobs_run_one_after_the_other(rig: Rig) -> None:
    first, second = rig.job(), rig.job()
    rig.run()
    rig.until(second, "succeeded")
    assert rig.jobs.get(first.id).progress.finished_at is not None
    starts = [rig.jobs.get(job.id).status for job in (first, second)]
    assert starts == ["succeeded", "succeeded"]


def test_a_trainer_that_is_killed_goes_on_from_its_checkpoint(rig: Rig) -> None:
    job = rig.job()
    rig.run(do="attempt == 1 and step == 6 and os.kill(os.getpid(), 9)")
    assert rig.until(job, "succeeded", "failed").status == "succeeded"
    said = rig.said(job)
    assert "Interrupted, for the trainer was killed by signal 9; going on from step 4" in said
    assert "Going on from step 4/8" in said
    assert said.count("Step 5/8: training loss=0.40") == 2


def test_a_trainer_that_dies_again_and_again_fails(rig: Rig) -> None:
    job = rig.job()
    rig.run(do="step == 3 and os.kill(os.getpid(), 9)")
    error = rig.until(job, "failed").progress.error
    assert error is not None
    assert (error.code, error.message) == ("server_error", "the trainer was killed by signal 9")
    # Once behind its first checkpoint, then three times more.
    assert (rig.home / "attempts").read_text() == "4"
    rig.until_swept()
    assert rig.names() == [named(job, 2)]


def test_progress_counts_anew(rig: Rig) -> None:
    job = rig.job()
    rig.run(do="(attempt + 2) // 3 <= 3 and step > 2 * ((attempt + 2) // 3) and os.kill(os.getpid(), 9)")
    assert rig.until(job, "succeeded", "failed").status == "succeeded"
    assert int((rig.home / "attempts").read_text()) == 10


def test_no_memory_fails_at_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    kills = iter(range(1000))
    monkeypatch.setattr("edgellm.tune.process._oom_kills", lambda: {"x": str(next(kills))})
    job = rig.job()
    rig.run(do="os.kill(os.getpid(), 9)")
    error = rig.until(job, "failed").progress.error
    assert error is not None
    assert error.code == "out_of_memory"
    assert "memory_budget_bytes" in error.message
    assert (rig.home / "attempts").read_text() == "1"


def test_a_failure_is_told_with_its_code(rig: Rig) -> None:
    job = rig.job()
    rig.run(
        do='tell("failed", code="invalid_training_file", message="line 3: x", param="validation_file"); sys.exit(1)'
    )
    error = rig.until(job, "failed").progress.error
    assert error is not None
    assert (error.code, error.message, error.param) == ("invalid_training_file", "line 3: x", "validation_file")
    assert rig.until_swept() is None


def test_what_the_job_needs_must_be_there(rig: Rig) -> None:
    lost = rig.files.add(b"x", "a", "fine-tune")
    rig.files.delete(lost.id)
    jobs = {
        ("file_not_found", "training_file"): rig.job(training_file=lost.id),
        ("file_not_found", "validation_file"): rig.job(validation_file=lost.id),
        ("model_not_found", "model"): rig.job(model="gone"),
        ("model_changed", "model"): rig.job(model_sha256="0" * 64),
    }
    rig.run()
    for expected, job in jobs.items():
        error = rig.until(job, "failed").progress.error
        assert error is not None
        assert (error.code, error.param) == expected
    assert not (rig.home / "attempts").exists()


def test_cancelling_ends_the_trainer_and_removes_what_it_had(rig: Rig) -> None:
    job = rig.job()
    supervisor = rig.run(steps=100_000)
    rig.until_step(job, 5)
    supervisor.heed(rig.jobs.cancel(job.id))
    rig.until_swept()
    assert rig.process is None
    assert rig.jobs.get(job.id).status == "cancelled"
    assert len(rig.names()) <= 3  # its checkpoints


def test_another_process_may_cancel(rig: Rig) -> None:
    job = rig.job()
    rig.run(steps=100_000)
    rig.until_step(job, 1)
    rig.jobs.cancel(job.id)
    rig.until_swept()


def test_pause_and_resume(rig: Rig) -> None:
    job = rig.job()
    supervisor = rig.run(do="attempt == 1 and step > 5 and time.sleep(0.01)", steps=300)
    rig.until_step(job, 7)
    supervisor.heed(rig.jobs.pause(job.id))
    wait_until(lambda: rig.process is None, "the trainer ends")
    assert rig.folders == [job.id]
    reached = rig.jobs.get(job.id).progress.checkpoint_step
    rig.jobs.resume(job.id)
    supervisor.wake()
    rig.until(job, "succeeded")
    assert reached is not None
    assert reached >= 7
    assert f"Going on from step {reached}/300" in rig.said(job)


def test_pausing_before_it_has_begun_loses_nothing(rig: Rig) -> None:
    job = rig.job()
    supervisor = rig.run()
    supervisor.give_way()
    wait_until(lambda: rig.process is not None, "a trainer")
    supervisor.heed(rig.jobs.pause(job.id))
    wait_until(lambda: rig.process is None, "the trainer ends")
    supervisor.go_on()
    rig.jobs.resume(job.id)
    supervisor.wake()
    rig.until(job, "succeeded")


def test_giving_way_holds_for_trainers_that_start_later(rig: Rig) -> None:
    job = rig.job()
    supervisor = rig.run(steps=50)
    supervisor.give_way()
    wait_until(lambda: rig.process is not None and _state(rig.process) == "T", "it halts")
    before = len(rig.said(job))
    assert _state(rig.process) == "T"
    assert len(rig.said(job)) == before
    supervisor.go_on()
    rig.until(job, "succeeded")


def _state(pid: int | None) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def test_the_servers_end_leaves_a_checkpoint_and_the_next_goes_on(rig: Rig) -> None:
    job = rig.job()
    rig.run(do="attempt == 1 and step > 3 and time.sleep(0.01)", steps=300)
    rig.until_step(job, 5)
    rig.end()
    stopped = rig.jobs.get(job.id)
    assert stopped.status == "running"
    reached = stopped.progress.checkpoint_step
    assert reached is not None
    rig.run(steps=300)
    rig.until(job, "succeeded")
    assert f"Interrupted; going on from step {reached}" in rig.said(job)
    assert f"Going on from step {reached}/300" in rig.said(job)


def test_one_that_does_not_stop_in_time_is_killed(rig: Rig) -> None:
    job = rig.job()
    supervisor = rig.run(do="step == 3 and time.sleep(1000)")
    rig.until_step(job, 2)
    supervisor.close(0.05)
    assert rig.process is None
    assert rig.jobs.get(job.id).status == "running"


def test_only_the_owner_runs_jobs(rig: Rig) -> None:
    other = Ownership(rig.home)
    assert other.acquire()
    job = rig.job()
    supervisor = rig.run()
    supervisor.wake()
    time.sleep(0)
    assert rig.process is None
    other.release()
    supervisor.wake()
    rig.until(job, "succeeded")


def crash_at(rig: Rig, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int, *, after: bool) -> None:
    """The `number`th call of a method does what it does, or does not, and then the server dies, as far as one sees."""
    real: Callable[..., Any] = getattr(owner, name)
    calls = iter(range(1, 10_000))

    def dying(*arguments: Any, **more: Any) -> Any:
        if next(calls) != number:
            return real(*arguments, **more)
        if after:
            real(*arguments, **more)
        rig.supervisor._closing = True  # type: ignore[union-attr]
        raise SystemExit

    monkeypatch.setattr(owner, name, dying)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("where", "name", "number"),
    [
        ("tuned", "add", 1),
        ("tuned", "add", 2),
        ("tuned", "add", 5),
        ("jobs", "add_checkpoint", 2),
        ("jobs", "prune_checkpoints", 4),
        ("jobs", "progress", 3),
        ("files", "add", 1),
        ("jobs", "succeed", 1),
        ("jobs", "claim", 1),
    ],
)
def test_a_crash_between_any_two_steps_loses_nothing_and_doubles_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, where: str, name: str, number: int, after: bool
) -> None:
    job = rig.job()
    with monkeypatch.context() as patched:
        crash_at(rig, patched, getattr(rig, where), name, number, after=after)
        rig.run()
        wait_until(lambda: rig.supervisor is not None and not rig.supervisor._thread.is_alive(), "it dies")  # type: ignore[union-attr]
    if (name, after) != ("succeed", True):
        assert rig.jobs.get(job.id).status in ("running", "queued")
    rig.served.published.clear()
    rig.tuned.publish_all(rig.jobs)
    rig.run()
    ended = rig.until(job, "succeeded", "failed")
    rig.until_swept()
    assert ended.progress.fine_tuned_model == named(job)
    results = rig.files.list(purpose="fine-tune-results").items
    assert [file.id for file in results] == list(ended.progress.result_files)
    listed = {named(job), *(one.model for one in rig.jobs.checkpoints(job.id).items)}
    assert set(rig.names()) == listed == set(rig.served.published)


def test_cancelled_at_the_last_moment(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    job = rig.job()
    add = rig.files.add

    def cancelling(*arguments: Any, **more: Any) -> Any:
        rig.jobs.cancel(job.id)
        return add(*arguments, **more)

    monkeypatch.setattr(rig.files, "add", cancelling)
    rig.run()
    rig.until(job, "cancelled")
    rig.until_swept()
    wait_until(lambda: named(job) not in rig.names(), "its model is removed")
    assert not rig.files.list(purpose="fine-tune-results").items


def test_a_full_disk_fails_the_job_once_there_is_room_to_say_so(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    job, other = rig.job(), rig.job()
    full = {"log": True, "fail": True}
    for name in ("log", "fail"):
        real = getattr(rig.jobs, name)

        def tried(*arguments: Any, name: str = name, real: Any = real, **more: Any) -> Any:
            if full[name] and arguments[0] == job.id:
                raise StorageError("the disk is full")
            return real(*arguments, **more)

        monkeypatch.setattr(rig.jobs, name, tried)
    supervisor = rig.run()
    wait_until(lambda: bool(supervisor._unsaid), "it cannot even say so")
    assert not rig.folders  # its room was given back
    full["fail"] = False
    supervisor.wake()
    error = rig.until(job, "failed").progress.error
    assert error is not None
    assert (error.code, error.message) == ("storage_failed", "the disk is full")
    supervisor.wake()
    rig.until(other, "succeeded")


def test_a_job_whose_folder_cannot_be_made(rig: Rig) -> None:
    (rig.home / "tuning").write_text("in the way")
    job = rig.job()
    rig.run()
    error = rig.until(job, "failed").progress.error
    assert error is not None
    assert error.code == "storage_failed"


def test_the_real_trainer_killed_at_random(rig: Rig) -> None:
    pytest.importorskip("torch")
    hyperparameters = {"n_epochs": 6, "batch_size": 1, "sparsity": "top-1"}
    job = rig.job(method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}})
    rig.run(command=TRAINER)
    chance = random.Random(7)
    for _ in range(2):
        rig.until_step(job, chance.randrange(8, 60))
        if (pid := rig.process) is not None:
            os.kill(pid, signal.SIGKILL)
    assert rig.until(job, "succeeded", "failed").status == "succeeded"
    assert any("Interrupted, for the trainer was killed by signal 9" in text for text in rig.said(job))
    rows = rig.files.path(rig.jobs.get(job.id).progress.result_files[0]).read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == [str(step) for step in range(1, 73)]
    rig.until_swept()
