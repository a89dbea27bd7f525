"""Schemes: what is written, what it stands for, and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.errors import ConfigError
from edgellm.tune.architecture import TARGETS
from edgellm.tune.scheme import Site, check_scheme, every_site, parse_scheme, scheme_text

LAYERS = 12
sites = st.sets(st.sampled_from(every_site(LAYERS)), min_size=1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", every_site(LAYERS)),
        ("top-2", every_site(LAYERS, 10)),
        ("top-99", every_site(LAYERS)),
        ("3", tuple(sorted(Site(3, name) for name in TARGETS))),
        ("3-4:attn_v", (Site(3, "attn_v"), Site(4, "attn_v"))),
        ("11:ffn_up+3:attn_v,attn_q", (Site(3, "attn_q"), Site(3, "attn_v"), Site(11, "ffn_up"))),
    ],
)
def test_what_a_scheme_stands_for(text: str, expected: tuple[Site, ...]) -> None:
    check_scheme(text)
    assert sorted(parse_scheme(text, LAYERS)) == sorted(expected)


@given(chosen=sites)
def test_what_is_written_is_read_again(chosen: set[Site]) -> None:
    text = scheme_text(chosen, LAYERS)
    check_scheme(text)
    assert set(parse_scheme(text, LAYERS)) == chosen


def test_short_where_it_can_be() -> None:
    assert scheme_text(every_site(LAYERS), LAYERS) == "none"
    assert scheme_text(every_site(LAYERS, 4), LAYERS) == "top-8"
    assert scheme_text([Site(layer, "attn_v") for layer in (2, 3, 4, 7)], LAYERS) == "2-4:attn_v+7:attn_v"


@pytest.mark.parametrize(
    "text", ["", "top", "top-0", "top--1", "3-", "a", "3:", "3:head", "3+", "+3", "top-3;4", "3:attn_v,", "9" * 30]
)
def test_what_is_no_scheme_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="sparsity"):
        check_scheme(text)


@pytest.mark.parametrize("text", ["12", "5-3", "3-12"])
def test_layers_that_the_model_has_not_are_refused(text: str) -> None:
    check_scheme(text)
    with pytest.raises(ConfigError, match="the model has layers 0 to 11"):
        parse_scheme(text, LAYERS)
