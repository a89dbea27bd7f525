"""Copies of the dense part: what is in them, when they are made, and what becomes of the old ones."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from edgellm.errors import ModelLoadError
from edgellm.models.gguf import GGUFHeader, read_header
from edgellm.models.split import split_headers
from edgellm.moe import skeleton
from edgellm.moe.skeleton import PROFILE_NAME, profile_path, skeleton_bytes, skeleton_of
from tests.support.tiny_moe import write_tiny_moe


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tiny_moe(tmp_path / "moe.gguf", "deepseek", experts=8)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def headers_of(path: Path) -> tuple[GGUFHeader, ...]:
    return split_headers(read_header(path))


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


def test_it_has_holes_in_place_of_experts(tmp_path: Path, home: Path) -> None:
    path = write_tiny_moe(tmp_path / "moe.gguf", "qwen3moe", experts=32, width=256, expert_width=256)
    copy = skeleton_of(headers_of(path), home)
    assert copy.name == path.name
    assert copy.stat().st_size == path.stat().st_size
    assert copy.stat().st_blocks * 512 < skeleton_bytes(headers_of(path)) + 64 * 4096
    header, original, sparse = read_header(copy), path.read_bytes(), copy.read_bytes()
    assert sparse[: header.data_offset] == original[: header.data_offset]
    for tensor in header.tensors:
        start = header.data_offset + tensor.offset
        same = sparse[start : start + tensor.n_bytes] == original[start : start + tensor.n_bytes]
        assert same == ("_exps.weight" not in tensor.name)


def test_it_is_made_once_and_anew_when_the_file_changes(path: Path, home: Path) -> None:
    copy = skeleton_of(headers_of(path), home)
    made = copy.stat().st_mtime_ns
    assert skeleton_of(headers_of(path), home) == copy
    assert copy.stat().st_mtime_ns == made
    touch(path)
    other = skeleton_of(headers_of(path), home)
    assert other != copy
    assert not copy.exists()
    assert profile_path(headers_of(path), home).parent == other.parent


def test_files_of_the_same_name_have_copies_of_their_own(path: Path, home: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    other = Path(shutil.copy2(path, tmp_path / "elsewhere"))
    first, second = skeleton_of(headers_of(path), home), skeleton_of(headers_of(other), home)
    assert first != second
    assert first.is_file()
    touch(other)
    third = skeleton_of(headers_of(other), home)
    assert first.is_file()
    assert third.is_file()
    assert not second.exists()


@pytest.mark.parametrize("names", [[PROFILE_NAME], ["checksums.npy", PROFILE_NAME], []])
def test_a_folder_without_a_copy_is_filled(names: list[str], path: Path, home: Path) -> None:
    folder = profile_path(headers_of(path), home).parent
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text("kept")
    copy = skeleton_of(headers_of(path), home)
    assert read_header(copy).tensors == read_header(path).tensors
    assert [(folder / name).read_text() for name in names] == ["kept"] * len(names)
    assert not list(folder.parent.glob(".making-*"))


def test_another_process_may_be_faster(path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def late(making: Path, folder: Path) -> Path:
        shutil.copytree(making, folder)
        (folder / path.name).chmod(0o400)  # the mark of the other one's
        return rename(making, folder)

    monkeypatch.setattr(Path, "rename", late)
    assert skeleton_of(headers_of(path), home).stat().st_mode & 0o777 == 0o400


def test_a_folder_that_cannot_be_renamed_is_an_error(path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(making: Path, folder: Path) -> Path:
        raise PermissionError(errno.EACCES, "Permission denied", str(making), None, str(folder))

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(ModelLoadError, match=r"cannot be copied: Permission denied$"):
        skeleton_of(headers_of(path), home)
    assert not list((home / "experts").iterdir())


def test_a_copy_that_vanishes_is_an_error(path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    move = skeleton._move

    def and_remove(making: Path, folder: Path, names: list[str]) -> None:
        move(making, folder, names)
        shutil.rmtree(folder)

    monkeypatch.setattr(skeleton, "_move", and_remove)
    with pytest.raises(ModelLoadError, match="was removed while it was made"):
        skeleton_of(headers_of(path), home)


def test_a_file_that_changes_meanwhile_is_an_error(path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    headers = headers_of(path)
    copy = skeleton._copy_dense

    def and_touch(header: GGUFHeader, target: Path) -> None:
        copy(header, target)
        touch(path)

    with monkeypatch.context() as patch:
        patch.setattr(skeleton, "_copy_dense", and_touch)
        with pytest.raises(ModelLoadError, match="changed while it was copied"):
            skeleton_of(headers, home)
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelLoadError, match="changed while it was loaded"):
        skeleton_of(headers, home)
    assert not list((home / "experts").iterdir())


def test_what_was_left_half_made_goes_after_a_day(path: Path, home: Path) -> None:
    old, new = home / "experts" / ".making-old", home / "experts" / ".making-new"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / path.name).write_text("half")
    day_ago = new.stat().st_mtime - 25 * 3600
    os.utime(old, (day_ago, day_ago))
    skeleton_of(headers_of(path), home)
    assert not old.exists()
    assert new.exists()


def test_no_room(path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(skeleton.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(ModelLoadError, match="needs 0 MiB of disk"):
        skeleton_of(headers_of(path), home)
    assert not list(home.rglob("*.gguf"))


def test_a_home_that_cannot_be_written_is_not_named(
    path: Path, home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """To clients; the log names it."""
    home.write_text("a file")
    with pytest.raises(ModelLoadError, match="cannot be copied") as found:
        skeleton_of(headers_of(path), home)
    assert str(tmp_path) not in str(found.value)
    assert str(home) in caplog.text


def test_the_first_file_is_moved_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    making, folder = tmp_path / "making", tmp_path / "folder"
    names, moved, replace = ["a-1", "a-2", "a-3"], [], os.replace
    for place, content in ((making, names), (folder, [PROFILE_NAME])):
        place.mkdir()
        for name in content:
            (place / name).write_text(name)

    def seen(source: Path, target: Path) -> None:
        moved.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", seen)
    skeleton._move(making, folder, names)
    assert moved == names[::-1]
    assert sorted(file.name for file in folder.iterdir()) == [*names, PROFILE_NAME]
