"""Jobs: the states they may go through, what is remembered of them, and that races have one winner."""

from __future__ import annotations

import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from edgellm.errors import JobNotFoundError, JobStateError, RequestError, StorageError
from edgellm.tune.database import DATABASE, Database
from edgellm.tune.job_types import JobError, JobRequest, JobStatus
from edgellm.tune.jobs import JobStore

REQUEST = JobRequest("m", "file-1", None, 7, {"type": "supervised"}, "mine", {"a": "ü"}, "00ff")


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        self.seconds += 1
        return self.seconds


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "home")
    yield opened
    opened.close()


@pytest.fixture
def jobs(database: Database) -> JobStore:
    return JobStore(database, Clock())


def running(jobs: JobStore) -> str:
    jobs.validated(jobs.create(REQUEST).id)
    job = jobs.claim()
    assert job is not None
    return job.id


def messages(jobs: JobStore, job_id: str) -> list[str]:
    return [event.message for event in reversed(jobs.events(job_id).items)]


def test_a_job_from_beginning_to_end(jobs: JobStore) -> None:
    job = jobs.create(REQUEST)
    assert job.id.startswith("ftjob-")
    assert (job.status, job.request, job.created_at) == (JobStatus.VALIDATING, REQUEST, 1001)
    assert jobs.claim() is None
    jobs.validated(job.id)
    assert jobs.claim() == jobs.get(job.id)
    assert jobs.claim() is None
    jobs.progress(job.id, trained_tokens=5, estimated_finish=2000, hyperparameters={"n_epochs": 3})
    jobs.log(job.id, "Step 1/2", metrics={"step": 1, "train_loss": 0.5})
    checkpoint = jobs.add_checkpoint(job.id, 1, "jobs/x/1", "ft:m::x:ckpt-step-1", {"train_loss": 0.5})
    done = jobs.succeed(job.id, "ft:m::x", 10, ("file-9",))
    assert done == jobs.get(job.id)
    assert done.status.is_final
    assert done.progress.trained_tokens == 10
    assert done.progress.hyperparameters == {"n_epochs": 3}
    assert done.progress.estimated_finish is None
    assert done.progress.finished_at is not None
    assert jobs.last_checkpoint(job.id) == checkpoint
    assert messages(jobs, job.id)[-3:] == [
        "Step 1/2", "Checkpoint created at step 1", "The job has successfully completed"
    ]  # fmt: skip
    metrics = [event for event in jobs.events(job.id).items if event.type == "metrics"]
    assert [event.data for event in metrics] == [{"step": 1, "train_loss": 0.5}]


def test_a_failure_is_kept_with_its_reason(jobs: JobStore) -> None:
    job_id, error = jobs.create(REQUEST).id, JobError("invalid_training_file", "line 3: no", "training_file")
    assert jobs.fail(job_id, error).progress.error == error
    assert jobs.get(job_id).progress.error == error
    assert jobs.events(job_id).items[0].level == "error"


def test_what_ran_when_the_process_ended_goes_on_from_its_last_checkpoint(jobs: JobStore) -> None:
    first, second = running(jobs), running(jobs)
    for step in (10, 20):
        jobs.add_checkpoint(first, step, f"jobs/{first}/{step}", "name", {})
    waiting = jobs.create(REQUEST).id
    assert [job.id for job in jobs.recover()] == [first, second]
    assert messages(jobs, first)[-1] == "Interrupted; going on from step 20"
    assert messages(jobs, second)[-1] == "Interrupted; going on from its beginning"
    assert jobs.get(waiting).status is JobStatus.VALIDATING
    assert jobs.recover() == ()
    job = jobs.claim()
    assert job is not None
    last = jobs.last_checkpoint(job.id)
    assert last is not None
    assert (job.id, last.step) == (first, 20)


def test_a_step_that_is_done_again_replaces_its_checkpoint(jobs: JobStore) -> None:
    job_id = running(jobs)
    for path in ("a", "b"):
        jobs.add_checkpoint(job_id, 10, path, "name", {})
    assert [checkpoint.path for checkpoint in jobs.checkpoints(job_id).items] == ["b"]


def test_a_trainer_that_is_paused_may_still_write_its_checkpoint(jobs: JobStore) -> None:
    job_id = running(jobs)
    jobs.pause(job_id)
    jobs.add_checkpoint(job_id, 5, "a", "name", {})
    with pytest.raises(JobStateError):
        jobs.progress(job_id, trained_tokens=1)
    jobs.cancel(job_id)
    with pytest.raises(JobStateError):
        jobs.add_checkpoint(job_id, 6, "a", "name", {})


def test_pages(jobs: JobStore) -> None:
    ids = [jobs.create(REQUEST).id for _ in range(5)][::-1]
    first = jobs.list(limit=2)
    assert ([job.id for job in first.items], first.has_more) == (ids[:2], True)
    rest = jobs.list(after=ids[1], limit=3)
    assert ([job.id for job in rest.items], rest.has_more) == (ids[2:], False)
    with pytest.raises(RequestError):
        jobs.list(after="ftjob-none")
    with pytest.raises(RequestError):
        jobs.events(ids[0], after=jobs.events(ids[1]).items[0].id)


def test_jobs_that_are_not_there(jobs: JobStore) -> None:
    for call in (jobs.get, jobs.cancel, jobs.events, jobs.checkpoints, jobs.delete):
        with pytest.raises(JobNotFoundError):
            call("ftjob-none")


def test_a_job_that_has_ended_can_be_forgotten(jobs: JobStore) -> None:
    job_id = running(jobs)
    jobs.add_checkpoint(job_id, 1, "a", "name", {})
    with pytest.raises(JobStateError):
        jobs.delete(job_id)
    jobs.cancel(job_id)
    jobs.delete(job_id)
    assert jobs.list().items == ()
    assert jobs.last_checkpoint(job_id) is None


def test_every_job_is_claimed_once(database: Database) -> None:
    stores = [JobStore(database), JobStore(other := Database(database.home))]
    wanted = {stores[0].validated(stores[0].create(REQUEST).id).id for _ in range(20)}
    claimed: list[str] = []

    def claim(store: JobStore) -> None:
        while (job := store.claim()) is not None:
            claimed.append(job.id)

    threads = [threading.Thread(target=claim, args=(store,)) for store in stores * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    assert len(claimed) == 20
    assert set(claimed) == wanted


def test_the_database_is_private(jobs: JobStore, database: Database) -> None:
    jobs.create(REQUEST)
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in database.home.iterdir()}
    assert set(found) == {DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm"}
    assert set(found.values()) == {0o600}
    assert stat.S_IMODE(database.home.stat().st_mode) == 0o700


def test_a_database_that_is_none_or_newer_is_refused(tmp_path: Path, database: Database) -> None:
    (tmp_path / DATABASE).write_bytes(b"not a database" * 100)
    with pytest.raises(StorageError, match="not a database"):
        Database(tmp_path)
    with database.reading() as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(StorageError, match="newer edgellm"):
        Database(database.home)


def test_a_transaction_that_fails_leaves_nothing(jobs: JobStore, database: Database) -> None:
    def change(statement: str) -> None:
        with database.transaction() as connection:
            connection.execute("DELETE FROM jobs")
            connection.execute(statement)
            raise ZeroDivisionError

    job_id = jobs.create(REQUEST).id
    before = (jobs.get(job_id), jobs.events(job_id))
    with pytest.raises(ZeroDivisionError):
        change("DELETE FROM events")
    with pytest.raises(StorageError):
        change("INSERT INTO events VALUES (1)")
    assert (jobs.get(job_id), jobs.events(job_id)) == before


_ALLOWED = {
    JobStatus.VALIDATING: {"validated", "fail", "cancel"},
    JobStatus.QUEUED: {"claim", "pause", "fail", "cancel"},
    JobStatus.RUNNING: {"recover", "pause", "succeed", "fail", "cancel"},
    JobStatus.PAUSED: {"resume", "fail", "cancel"},
}
_RESULT = {
    "validated": JobStatus.QUEUED, "claim": JobStatus.RUNNING, "recover": JobStatus.QUEUED, "pause": JobStatus.PAUSED,
    "resume": JobStatus.QUEUED, "succeed": JobStatus.SUCCEEDED, "fail": JobStatus.FAILED,
    "cancel": JobStatus.CANCELLED,
}  # fmt: skip


class States(RuleBasedStateMachine):
    """Any order of actions: those that the table allows work, the others raise and change nothing."""

    home: Path

    @initialize()
    def begin(self) -> None:
        self.database = Database(self.home)
        self.jobs = JobStore(self.database)
        for status in (JobStatus.QUEUED, JobStatus.RUNNING):  # left by an earlier example
            for job in self.jobs.with_status(status):
                self.jobs.cancel(job.id)
        self.id = self.jobs.create(REQUEST).id
        self.status = JobStatus.VALIDATING

    @rule(action=st.sampled_from(sorted(_RESULT)))
    def act(self, action: str) -> None:
        before = self.jobs.get(self.id)
        allowed = action in _ALLOWED.get(self.status, set())
        if action in ("claim", "recover"):
            getattr(self.jobs, action)()
        else:
            more = {"succeed": ("ft", 1, ()), "fail": (JobError("a", "b"),)}.get(action, ())
            if not allowed:
                with pytest.raises(JobStateError):
                    getattr(self.jobs, action)(self.id, *more)
            else:
                getattr(self.jobs, action)(self.id, *more)
        self.status = _RESULT[action] if allowed else self.status
        after = self.jobs.get(self.id)
        assert after.status is self.status
        if not allowed:
            assert after == before

    def teardown(self) -> None:
        if hasattr(self, "database"):
            self.database.close()


def test_only_the_transitions_of_the_table_are_made(tmp_path: Path) -> None:
    States.home = tmp_path / "home"
    States.TestCase.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
    States.TestCase("runTest").debug()
