"""Lists in pages, as OpenAI's API turns them: so many items after the one of a given id."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from edgellm.errors import RequestError

Order = Literal["asc", "desc"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some items of a list, and whether there are more after them."""

    items: tuple[T, ...]
    has_more: bool


def new_id(prefix: str) -> str:
    """`prefix` and 24 random characters."""
    return prefix + secrets.token_hex(12)


def read_page(
    connection: sqlite3.Connection,
    table: str,
    make: Callable[[sqlite3.Row], T],
    *,
    where: dict[str, str],
    after: str | None,
    limit: int,
    order: Order,
    having: Sequence[tuple[str, tuple[str, ...]]] = (),
) -> Page[T]:
    """Rows of `table` in which the columns of `where` have these values, newest (desc) or oldest (asc) first.

    `having` are further conditions with their values. Table, columns and conditions are the caller's own words, never a
    request's. Raises RequestError if `after` is none of the rows.
    """
    terms, values = [f"{column} = ?" for column in where], list[str | int](where.values())
    if after is not None:
        query = " AND ".join([*terms, "id = ?"])
        found = connection.execute(f"SELECT seq FROM {table} WHERE {query}", [*values, after]).fetchone()  # noqa: S608
        if found is None:
            raise RequestError(f"The list has no item {after[:100]!r}", "after")
        terms.append("seq < ?" if order == "desc" else "seq > ?")
        values.append(int(found["seq"]))
    for term, found_values in having:
        terms.append(term)
        values.extend(found_values)
    condition = f"WHERE {' AND '.join(terms)}" if terms else ""
    query = f"SELECT * FROM {table} {condition} ORDER BY seq {order} LIMIT ?"  # noqa: S608
    rows = connection.execute(query, [*values, limit + 1]).fetchall()
    return Page(tuple(make(row) for row in rows[:limit]), len(rows) > limit)
