"""What is hooked into llama.cpp is hooked in once, whichever threads load the first models."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from edgellm.backend import experts, packing


@pytest.mark.parametrize(("module", "ask"), [(packing, packing.packing_kernels), (experts, experts.paging_fault)])
def test_one_thread_at_a_time(module: object, ask: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[bool] = []

    def installed() -> str:
        """Holds the lock: another thread cannot have it, this one can ask again."""
        thread = threading.Thread(target=lambda: others.append(packing.INSTALLING.acquire(blocking=False)))
        thread.start()
        thread.join()
        assert packing.INSTALLING.acquire(blocking=False)
        packing.INSTALLING.release()
        return "done"

    monkeypatch.setattr(module, "_installed", installed)
    assert ask() == "done"
    assert others == [False]


@pytest.mark.parametrize("ask", [packing.packing_kernels, experts.paging_fault])
def test_what_was_installed_is_not_installed_again(ask: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    before = ask()
    for name in ("install_packing", "install_experts"):
        monkeypatch.setattr(f"edgellm._kernels.{name}", lambda *_: pytest.fail("it was installed again"))
    assert ask() == before
