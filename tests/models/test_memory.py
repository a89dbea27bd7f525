"""The estimate against what llama.cpp was seen to take; the memory there is, from made-up /proc and cgroup trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm.models.describe import describe
from edgellm.models.memory import available_memory_bytes, estimate_memory
from edgellm.models.store import ModelStore
from tests.support.tiny_gguf import write_tiny_bert, write_tiny_llama, write_tiny_mamba

MIB = 1 << 20


def test_kv_is_exact(tmp_path: Path) -> None:
    info = describe(write_tiny_llama(tmp_path / "a.gguf", layers=3, kv_heads=2))
    estimate = estimate_memory(info, 1024, 4, 128)
    assert estimate.kv_bytes == 1024 * 3 * 2 * (16 + 16) * 2
    assert estimate_memory(info, 1000, 4, 128).kv_bytes == estimate.kv_bytes  # cells come in steps of 256
    assert estimate.total_bytes == estimate.weights_bytes + estimate.kv_bytes + estimate.compute_bytes
    assert estimate.weights_bytes > info.tensor_bytes


def test_the_bundled_model_by_the_numbers_llama_cpp_prints(tmp_path: Path) -> None:
    info = describe(ModelStore(tmp_path).find("smollm2-135m-instruct").path)
    estimate = estimate_memory(info, 2048, 8, 256)
    assert estimate.kv_bytes == 45 * MIB
    # Measured: resident memory grows by 167 MiB in all (2048 cells, 8 sequences, chunks of 256, flash attention).
    assert 167 * MIB <= estimate.total_bytes <= 1.25 * 167 * MIB
    without = estimate_memory(info, 2048, 8, 256, flash_attention=False)
    assert 189 * MIB <= without.total_bytes <= 1.25 * 189 * MIB


def test_recurrent_state_grows_with_sequences_only(tmp_path: Path) -> None:
    info = describe(write_tiny_mamba(tmp_path / "a.gguf"))
    one, two = estimate_memory(info, 512, 1, 64), estimate_memory(info, 4096, 2, 64)
    assert one.kv_bytes == 2 * (384 + 2048) * 4
    assert two.kv_bytes == 2 * one.kv_bytes


def test_encoders_keep_no_cache(tmp_path: Path) -> None:
    assert estimate_memory(describe(write_tiny_bert(tmp_path / "a.gguf")), 512, 1, 64).kv_bytes == 0


def machine(tmp_path: Path, cgroup: str) -> tuple[Path, Path]:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    groups.mkdir()
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable:    8000 kB\n")
    (proc / "self" / "cgroup").write_text(cgroup)
    return proc, groups


def limit(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_available_without_limits(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path, "0::/user/app\n")
    assert available_memory_bytes(proc, groups) == 8000 * 1024
    limit(groups / "user" / "app", memory__max="max\n", memory__current="5\n")
    assert available_memory_bytes(proc, groups) == 8000 * 1024


def test_available_under_cgroup_v2(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path, "0::/user/app\n")
    limit(groups / "user" / "app", memory__max="max\n", memory__current="5\n")
    limit(groups / "user", memory__max="5000\n", memory__current="4000\n", memory__stat="anon 1\ninactive_file 300\n")
    assert available_memory_bytes(proc, groups) == 1300
    limit(groups, memory__max="100\n", memory__current="400\n")
    assert available_memory_bytes(proc, groups) == 0


@pytest.mark.parametrize("folder", ["memory/docker/abc", "memory"])  # as on the host, as in a container
def test_available_under_cgroup_v1(tmp_path: Path, folder: str) -> None:
    proc, groups = machine(tmp_path, "3:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n")
    limit(
        groups / folder,
        memory__limit_in_bytes="7000\n",
        memory__usage_in_bytes="6000\n",
        memory__stat="inactive_file 9\ntotal_inactive_file 500\n",
    )
    assert available_memory_bytes(proc, groups) == 1500


def test_available_elsewhere_and_here(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path, tmp_path) > MIB
    assert available_memory_bytes() > MIB
