"""What fine-tuned models are called."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.models.names import is_name
from edgellm.tune.names import checkpoint_name, is_tuned_name, sound_suffix, tuned_name

JOB = "ftjob-0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("base", "suffix", "name"),
    [
        ("SmolLM2-135M-Instruct", None, "ft:smollm2-135m-instruct:local::01234567"),
        ("owner/repo/Model-Q4_K_M", "My App", "ft:model-q4_k_m:local:my-app:01234567"),
        ("m", "a/b:c..", "ft:m:local:a-b-c..:01234567"),
        ("日本", "x" * 64, f"ft:model:local:{'x' * 64}:01234567"),
        ("m", "???", "ft:m:local::01234567"),
    ],
)
def test_names(base: str, suffix: str | None, name: str) -> None:
    assert tuned_name(base, suffix, JOB) == name
    assert is_tuned_name(name)
    assert checkpoint_name(name, 12) == f"{name}:ckpt-step-12"
    assert is_tuned_name(checkpoint_name(name, 12))


@given(
    suffix=st.text(max_size=64), base=st.text("abcXYZ/._:-019", min_size=1, max_size=300), step=st.integers(1, 10**9)
)
def test_every_name_can_be_stored(suffix: str, base: str, step: int) -> None:
    name = checkpoint_name(tuned_name(base, suffix, JOB), step)
    assert is_name(name)
    assert "/" not in name
    assert name == name.lower()
    assert is_tuned_name(name)
    assert sound_suffix(sound_suffix(suffix)) == sound_suffix(suffix)


def test_other_names_are_none() -> None:
    assert not any(map(is_tuned_name, ("mine", "ft:a:b:c", "ft:a:b:c:d:ckpt", "xft:a:b:c:d")))
