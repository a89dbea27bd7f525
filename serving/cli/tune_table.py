"""`edgellm tune plan`: what training each layer would bring, and the choices, as tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from serving.cli.tune_view import Event, JsonView, Teller, View, duration, mebibytes

_BAR_CELLS = 24
_STRONGEST = 3  # matrices named of each layer
_SCHEME_CHARS_MAX = 28


class PlanView(View):
    """Collects what the analysis finds; `print` shows it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = Console(stderr=True).status("Measuring what each layer contributes ...")
        self._teller = Teller()
        self._found: dict[str, list[Event]] = defaultdict(list)

    def __enter__(self) -> PlanView:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def show(self, event: Event) -> None:
        self._found[event["event"]].append(event)
        if event["event"] != "plan":  # the tables say it
            for line in self._teller.lines(event):
                self.say(line)

    def say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def print(self) -> None:
        """The tables, and the plan in words."""
        if self._found["contribution"]:
            self._console.print(contribution_table(self._found["contribution"]))
        if self._found["scheme"]:
            self._console.print(scheme_table(self._found["scheme"]))
        for plan in self._found["plan"]:
            for line in self._teller.lines(plan):
                self.say(line)
            self.say(f"the same without analysis: edgellm tune --sparsity {plan['sparsity']} ...")


def contribution_table(found: Sequence[Mapping[str, Any]]) -> Table:
    """A row a layer, the topmost first: a bar of its gain, and the matrices that give most of it."""
    layers: dict[int, dict[str, float]] = defaultdict(dict)
    for event in found:
        layers[event["layer"]][event["tensor"]] = max(0.0, event["gain"])
    sums = {layer: sum(gains.values()) for layer, gains in layers.items()}
    most, whole = max(sums.values()) or 1.0, sum(sums.values()) or 1.0
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("LAYER", justify="right")
    table.add_column("GAIN", no_wrap=True)
    table.add_column("", justify="right")
    table.add_column("MOST OF IT", overflow="fold")
    for layer in sorted(layers, reverse=True):
        strongest = sorted(layers[layer].items(), key=lambda item: -item[1])[:_STRONGEST]
        names = ", ".join(f"{name} {gain / whole:.1%}" for name, gain in strongest if gain > 0)
        table.add_row(str(layer), bar(sums[layer] / most), f"{sums[layer] / whole:.1%}", names)
    return table


def scheme_table(found: Iterable[Mapping[str, Any]]) -> Table:
    """A row a candidate, the chosen one marked. Schemes of many parts are cut short."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("", "SCHEME", "LAYERS", "MATRICES", "PARAMETERS", "MEMORY", "TIME", "OF THE GAIN"):
        table.add_column(title, justify="left" if title in ("", "SCHEME") else "right", overflow="fold")
    for event in found:
        low, high = event["layers"]
        table.add_row(
            "→" if event["chosen"] else "",
            text if len(text := event["text"]) <= _SCHEME_CHARS_MAX else text[: _SCHEME_CHARS_MAX - 1] + "…",
            f"{low}-{high}",
            f"{event['sites']:,}",
            f"{event['parameters']:,}",
            mebibytes(event["memory_bytes"]),
            duration(event["seconds"]),
            f"{event['share']:.0%}",
            style="bold" if event["chosen"] else None,
        )
    return table


def bar(share: float) -> str:
    """Blocks for 0 to 1, to an eighth of a cell."""
    eighths = round(share * _BAR_CELLS * 8)
    return "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")


def choose_plan_view(*, as_json: bool) -> PlanView | JsonView:
    """Tables, or the events as they come."""
    return JsonView() if as_json else PlanView(Console())
