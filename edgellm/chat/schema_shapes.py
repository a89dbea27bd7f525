"""JSON arrays and objects as GBNF, once the rules of their items and members are known."""

from __future__ import annotations

from edgellm.chat.gbnf import GrammarBuilder

_INLINE_CHARS = 200  # longer expressions that are used twice become rules


def array_rule(builder: GrammarBuilder, first: list[str], more: str, low: int, left: int | None) -> str:
    """`first`, item by item, then at most `left` (None: any number) of `more`; at least `low` items in all."""
    ws = builder.json("ws")
    comma = f'"," {ws}'
    wanted = max(low - len(first), 0)
    if not first:
        if left == 0:
            return builder.rule(f'"[" {ws} "]"', "a")
        item = builder.rule(f"{comma} {more}", "i")
        others = builder.repeat(item, max(wanted - 1, 0), None if left is None else left - 1)
        body = f"{more} {others} {ws}"
        return builder.rule(f'"[" {ws} {body if low else f"({body})?"} "]"', "a")
    tail = ""  # what may follow the items so far, the comma in front included
    if left != 0:
        tail = builder.repeat(builder.rule(f"{comma} {more}", "i"), wanted, left)
    for number in range(len(first) - 1, 0, -1):
        part = builder.rule(f"{comma} {first[number]} {tail}".rstrip(), "i")
        tail = part if number < low else f"{part}?"
    body = f"{first[0]} {tail} {ws}"
    return builder.rule(f'"[" {ws} {body if low else f"({body})?"} "]"', "a")


def object_rule(
    builder: GrammarBuilder, pairs: list[tuple[str, bool]], member: str | None, low: int, high: int | None
) -> str:
    """Members in order: `pairs` (expression, required), then `low` (0 or 1) to `high` (None: any number) of `member`.

    `low` and `high` only speak of objects without `pairs`, or, `low`, without required ones.
    """
    ws = builder.json("ws")
    comma = f'"," {ws}'
    free = ""  # free members after another member
    if member is not None:
        free = builder.repeat(builder.rule(f"{comma} {member}", "i"), 0, None if high is None else high - 1)
    tail = free  # what may follow a member
    tails = []
    for pair, required in reversed(pairs):
        tail = _named(builder, tail)
        tails.append(tail)
        tail = f"{comma} {pair} {tail}" if required else f"({comma} {pair})? {tail}"
    tails.reverse()
    # What may come first: any one of the optional pairs in front, or the first required one, or a free member.
    start = next((number for number, (_, required) in enumerate(pairs) if required), len(pairs))
    heads = [f"{pair} {tails[number]} {ws}" for number, (pair, _) in enumerate(pairs[: start + 1])]
    if start == len(pairs):
        heads += [f"{member} {free} {ws}"] if member is not None else []
        heads += [] if low else ['""']
    return builder.rule(f'"{{" {ws} ({" | ".join(heads)}) "}}"', "o")


def _named(builder: GrammarBuilder, expr: str) -> str:
    return builder.rule(expr, "o") if len(expr) > _INLINE_CHARS else expr
