"""One process at a time runs the jobs of a state directory."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgellm.errors import StorageError
from edgellm.tune.ownership import Ownership

HOLDER = """
import sys, time
from pathlib import Path
from edgellm.tune.ownership import Ownership
ours = Ownership(Path(sys.argv[1]))
print("held" if ours.acquire() else "not", flush=True)
time.sleep(600)
"""


def test_one_at_a_time(tmp_path: Path) -> None:
    one, two = Ownership(tmp_path / "home"), Ownership(tmp_path / "home")
    assert one.acquire()
    assert one.acquire()
    assert not two.acquire()
    one.release()
    one.release()
    assert two.acquire()
    two.release()


def test_a_holder_that_is_killed_holds_it_no_longer(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    ours = Ownership(tmp_path)
    assert not ours.acquire()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert ours.acquire()
    ours.release()


def test_a_place_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(StorageError):
        Ownership(tmp_path / "home").acquire()
