"""A replay's summary for a terminal. Everything that a client chose is escaped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sidecar.records import printable
from sidecar.replay.summary import ACTIONS, SCORE_BINS, Summary

BAR = 40


def show(
    console: Console,
    summary: Summary,
    seconds: float,
    top: int,
    sentence: Callable[[Mapping[str, Any], Mapping[str, Any]], str],
) -> None:
    """Print the tables; `top` rows of those that can be long."""
    _head(console, summary, seconds)
    if summary.refused_requests:
        _clients(console, summary, top, sentence)
        _reasons(console, summary, top)
    _routes(console, summary, top)
    if summary.labelled:
        _classes(console, summary, top)
    _scores(console, summary)


def _head(console: Console, summary: Summary, seconds: float) -> None:
    clients = f"{'at least ' if summary.more_clients else ''}{len(summary.clients):,} clients"
    refused = len(summary.refused_clients())
    console.print(
        Text(
            f"{summary.requests:,} requests of {clients}, {moment(summary.first_ts)} to "
            f"{moment(summary.last_ts)} UTC; "
            f"replayed in {seconds:.1f} s ({summary.requests / max(seconds, 1e-9):,.0f} requests/s)"
        )
    )
    share = summary.refused_requests / max(1, summary.requests)
    console.print(
        Text(
            f"{summary.refused_requests:,} requests ({share:.3%}) of {refused:,} clients "
            "would have been refused",
            style="bold",
        )
    )
    if summary.text_only:
        console.print(
            Text(f"{summary.text_only:,} requests without client or time were judged by their text alone")
        )
    table = _table("Actions", "action", "requests", "share")
    for action in ACTIONS:
        n = summary.actions[action]
        table.add_row(action, f"{n:,}", f"{n / max(1, summary.requests):.3%}")
    console.print(table)


def _clients(
    console: Console,
    summary: Summary,
    top: int,
    sentence: Callable[[Mapping[str, Any], Mapping[str, Any]], str],
) -> None:
    refused = summary.refused_clients()
    table = _table(
        _title("Refused clients", len(refused), top),
        "client",
        "requests",
        "refused",
        "first refused",
        "at its",
        "why",
        "with",
        left=("client", "why", "with"),
    )
    for name, client in refused[:top]:
        first = client.first or {}
        reasons = first.get("reasons") or ()
        table.add_row(
            _hostile(name, 45),
            f"{client.requests:,}",
            f"{client.refused:,}",
            moment(client.first_refused_at),
            f"{client.requests_until_refused:,}.",
            _hostile(sentence(reasons[0], first) if reasons else "", 110),
            _hostile(client.first_request, 70),
        )
    console.print(table)


def _reasons(console: Console, summary: Summary, top: int) -> None:
    table = _table("Reasons", "reason", "requests", "clients")
    for reason, n in summary.reasons.most_common(top):
        clients = sum(reason in (client.reasons or ()) for client in summary.clients.values())
        table.add_row(_hostile(reason, 60), f"{n:,}", f"{clients:,}")
    console.print(table)


def _routes(console: Console, summary: Summary, top: int) -> None:
    if len(summary.routes) < 2:
        return
    table = _table(_title("Routes", len(summary.routes), top), "route", "requests", *ACTIONS[1:])
    busiest = sorted(summary.routes.items(), key=lambda item: -item[1].total())
    for name, actions in busiest[:top]:
        table.add_row(_hostile(name, 60), f"{actions.total():,}", *(f"{actions[a]:,}" for a in ACTIONS[1:]))
    console.print(table)


def _classes(console: Console, summary: Summary, top: int) -> None:
    table = _table(
        "By what the data say",
        "class",
        "label",
        "requests",
        "refused",
        "share",
        "tagged",
        "clients",
        "refused",
        "until refused (median)",
    )
    groups = sorted(summary.classes.items(), key=lambda item: (item[0][0] or 0, item[0][1]))
    for (label, cls), group in groups[: 4 * top]:
        refused = sorted(
            client.requests_until_refused
            for name in group.clients
            if (client := summary.clients.get(name)) and client.refused
        )
        table.add_row(
            _hostile(cls, 40),
            "" if label is None else str(label),
            f"{group.requests:,}",
            f"{group.refused:,}",
            f"{group.refused / group.requests:.2%}",
            f"{group.tagged:,}",
            f"{len(group.clients):,}",
            f"{len(refused):,}",
            f"{refused[len(refused) // 2]:,}" if refused else "",
        )
    console.print(table)
    benign = [group for (label, _), group in summary.classes.items() if label == 0]
    attacks = [group for (label, _), group in summary.classes.items() if label == 1]
    for what, chosen in (
        ("benign requests refused (false positives)", benign),
        ("attack requests refused", attacks),
    ):
        total = sum(group.requests for group in chosen)
        if total:
            n = sum(group.refused for group in chosen)
            console.print(Text(f"{what}: {n:,} of {total:,} ({n / total:.3%})"))


def _scores(console: Console, summary: Summary) -> None:
    by_label = len(summary.bins) > 1
    labels = [None, 0, 1] if by_label else [next(iter(summary.bins), None)]
    names = {None: "no label" if by_label else "requests", 0: "benign", 1: "attack"}
    labels = [label for label in labels if label in summary.bins]
    table = _table("Scores", "score", *(names[label] for label in labels), "")
    totals = [sum(summary.bins[label][i] for label in labels) for i in range(SCORE_BINS)]
    most = max(totals, default=0)
    for i, total in enumerate(totals):
        # most requests are harmless: on a linear scale nothing else would be seen
        width = round(BAR * (total.bit_length() / max(1, most.bit_length())))
        table.add_row(
            f"{i / SCORE_BINS:.1f}-{(i + 1) / SCORE_BINS:.1f}",
            *(f"{summary.bins[label][i]:,}" for label in labels),
            "▇" * width,
        )
    console.print(table)


def moment(ts: float | None) -> str:
    """UTC, to the second."""
    if ts is None:
        return "-"
    return datetime.fromtimestamp(ts, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _hostile(text: str, chars_max: int) -> Text:
    """Text, not a str: rich would read markup in it."""
    return Text(printable(text, chars_max), overflow="fold")


def _title(name: str, n: int, top: int) -> str:
    return name if n <= top else f"{name} (the first {top} of {n:,})"


def _table(title: str, *columns: str, left: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(
            column, justify="left" if i == 0 or column in left or not column else "right", overflow="fold"
        )
    return table
