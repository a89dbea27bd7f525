"""The files: whole or not there, private, kept once, and what kill -9 leaves behind."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgellm.errors import FileTooLargeError, RequestError, StorageError, StoredFileNotFoundError
from edgellm.tune.database import Database
from edgellm.tune.files import FileStore
from edgellm.tune.jobs import JobStore

WRITER = """
import sys
from pathlib import Path
from edgellm.tune.database import Database
from edgellm.tune.files import FileStore
from edgellm.tune.job_types import JobRequest
from edgellm.tune.jobs import JobStore

database = Database(Path(sys.argv[1]))
files, jobs = FileStore(database), JobStore(database)
for number in range(10**9):
    data = b"%d" % number * 50_000
    with files.writer(len(data)) as writer:
        for start in range(0, len(data), 7777):
            writer.write(data[start : start + 7777])
        file = files.keep(writer, "a.jsonl", "fine-tune")
    job = jobs.validated(jobs.create(JobRequest("m", file.id, None, number, {})).id)
    jobs.claim()
    jobs.add_checkpoint(job.id, number, "a", "b", {})
    if number % 3 == 2:
        files.delete(file.id)
        jobs.cancel(job.id)
    print(number, file.id, job.id, flush=True)
"""


@pytest.fixture
def files(tmp_path: Path) -> Iterator[FileStore]:
    database = Database(tmp_path / "home")
    yield FileStore(database, lambda: 1000)
    database.close()


def contents(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "home" / "files").iterdir())


def test_a_file_comes_back_as_it_went_in(files: FileStore, tmp_path: Path) -> None:
    with files.writer(10) as writer:
        writer.write(b"hello")
        writer.write(b"world")
        file = files.keep(writer, "../odd\nname", "fine-tune")
    assert (file.bytes, file.created_at, file.filename) == (10, 1000, "../odd\nname")
    assert files.get(file.id) == file
    with files.open(file.id) as content:
        assert content.read() == b"helloworld"
    assert contents(tmp_path) == [hashlib.sha256(b"helloworld").hexdigest()]


def test_all_is_private(files: FileStore) -> None:
    path = files.path(files.add(b"a", "a", "fine-tune").id)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_equal_content_is_kept_once_and_until_the_last_is_deleted(files: FileStore, tmp_path: Path) -> None:
    one, two = (files.add(b"same", name, "fine-tune") for name in ("one", "two"))
    assert one.id != two.id
    assert len(contents(tmp_path)) == 1
    with files.open(two.id) as content:
        files.delete(one.id)
        assert files.path(two.id).read_bytes() == b"same"
        files.delete(two.id)
        assert content.read() == b"same"
    assert contents(tmp_path) == []
    for call in (files.get, files.open, files.delete):
        with pytest.raises(StoredFileNotFoundError):
            call(one.id)


def test_too_much_or_an_error_leaves_nothing(files: FileStore, tmp_path: Path) -> None:
    def write(*pieces: bytes) -> None:
        with files.writer(5) as writer:
            for piece in pieces:
                writer.write(piece)
            raise ZeroDivisionError

    with pytest.raises(FileTooLargeError, match="larger than"):
        write(b"123", b"456")
    with pytest.raises(ZeroDivisionError):
        write(b"123")
    assert contents(tmp_path) == []
    assert files.list().items == ()


def test_a_disk_that_takes_no_more_is_told(files: FileStore, tmp_path: Path) -> None:
    def write() -> None:
        with files.writer(1 << 20) as writer:
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, writer._file.fileno())
            os.close(full)
            writer.write(b"x" * (1 << 20))
            files.keep(writer, "a", "fine-tune")

    with pytest.raises(StorageError, match="No space left on device"):
        write()
    assert contents(tmp_path) == []


def test_lists(files: FileStore) -> None:
    ids = [files.add(b"%d" % number, "a", "fine-tune").id for number in range(3)]
    result = files.add(b"r", "r", "fine-tune-results").id
    assert [file.id for file in files.list().items] == [result, *ids[::-1]]
    assert [file.id for file in files.list(order="asc", limit=2, after=ids[0]).items] == ids[1:]
    assert [file.id for file in files.list(purpose="fine-tune-results").items] == [result]
    assert files.list(limit=3).has_more
    assert not files.list(limit=4).has_more
    with pytest.raises(RequestError):
        files.list(after=result, purpose="fine-tune")


def test_sweeping_takes_what_nobody_owns(files: FileStore, tmp_path: Path) -> None:
    kept = files.add(b"kept", "a", "fine-tune")
    folder = tmp_path / "home" / "files"
    (folder / "0123").write_bytes(b"content without an entry")
    (folder / ".writing-dead").write_bytes(b"left by a process that was killed")
    with files.writer(5) as writer:
        writer.write(b"alive")
        assert files.sweep() == 2
        live = files.keep(writer, "b", "fine-tune")
    assert files.path(live.id).read_bytes() == b"alive"
    assert files.path(kept.id).read_bytes() == b"kept"
    assert files.sweep() == 0


def test_content_that_is_gone_is_told(files: FileStore) -> None:
    file = files.add(b"a", "a", "fine-tune")
    files.path(file.id).unlink()
    with pytest.raises(StoredFileNotFoundError, match="gone from the disk"):
        files.open(file.id)
    files.delete(file.id)


@pytest.mark.parametrize("rounds", [1, 2, 5, 9, 14])
def test_kill_loses_nothing_that_was_acknowledged(tmp_path: Path, rounds: int) -> None:
    home = tmp_path / "home"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(home)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    acknowledged = [process.stdout.readline().split() for _ in range(rounds)]
    process.send_signal(signal.SIGKILL)  # it is somewhere in the middle of the next round
    acknowledged += [line.split() for line in process.stdout if line.endswith("\n")]
    process.wait()
    process.stdout.close()

    database = Database(home)
    files, jobs = FileStore(database), JobStore(database)
    files.sweep()
    listed = {file.id: file for file in files.list().items}
    for number, file_id, job_id in acknowledged:
        assert (file_id in listed) == (int(number) % 3 != 2)
        assert jobs.get(job_id).request.seed == int(number)
        assert jobs.last_checkpoint(job_id) is not None
    for file in listed.values():  # also one that was finished, but not acknowledged
        assert hashlib.sha256(files.path(file.id).read_bytes()).hexdigest() == file.sha256
    assert {path.name for path in (home / "files").iterdir()} == {file.sha256 for file in listed.values()}
    assert len(jobs.list(limit=100).items) - len(acknowledged) in (0, 1)
    interrupted = [job for job in jobs.recover() if job.id in {job_id for _, _, job_id in acknowledged}]
    assert len(interrupted) == sum(int(number) % 3 != 2 for number, _, _ in acknowledged)
    with database.reading() as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    database.close()
