"""The four forms in which prompts and texts to embed may come: a text, texts, token ids, lists of token ids."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from serving.wire.common import Text
from serving.wire.sampling import TokenId

INPUTS_MAX = 2048
INPUT_TOKENS_MAX = 1 << 20

_Text = Annotated[Text, Field(min_length=1)]
_Tokens = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=INPUT_TOKENS_MAX)]


def _form(value: Any) -> str:
    """Which form `value` has, by its first item: only that one is then tried, so errors name one expectation."""
    if not isinstance(value, list):
        return "#text"
    first = value[0] if value else None
    if isinstance(first, list):
        return "#token_lists"
    return "#tokens" if isinstance(first, int) else "#texts"


Inputs = Annotated[
    Annotated[_Text, Tag("#text")]
    | Annotated[list[_Text], Field(fail_fast=True, min_length=1, max_length=INPUTS_MAX), Tag("#texts")]
    | Annotated[_Tokens, Tag("#tokens")]
    | Annotated[list[_Tokens], Field(fail_fast=True, min_length=1, max_length=INPUTS_MAX), Tag("#token_lists")],
    Discriminator(_form),
]


def as_inputs(value: str | list[str] | list[int] | list[list[int]]) -> tuple[str | tuple[int, ...], ...]:
    """The inputs one by one, each a text or a tuple of token ids."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value[0], int):
        return (tuple(value),)
    return tuple(item if isinstance(item, str) else tuple(item) for item in value)
