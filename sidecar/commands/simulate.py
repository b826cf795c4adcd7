"""`outrider simulate`: traffic of normal users and of attackers, as request records."""

from __future__ import annotations

from collections import Counter

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from sidecar.records import JsonLinesWriter, RecordsError
from sidecar.simulate import ATTACKS, Attack, Scenario, simulate

_NAMES = "; ".join(f"{name} ({', '.join(variants)})" for name, variants in ATTACKS.items())


@click.command(name="simulate", short_help="Generate traffic of normal users and of attackers, with labels.")
@click.option(
    "--users", type=click.IntRange(0, 1_000_000), default=200, show_default=True, help="Number of people."
)
@click.option(
    "--hours", type=click.FloatRange(0.01, 8784.0), default=24.0, show_default=True, help="Time simulated."
)
@click.option(
    "--start-hour",
    type=click.FloatRange(0.0, 24.0),
    default=0.0,
    show_default=True,
    help="Hour of the day (UTC) at which it begins.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="The same seed and options give the same records.",
)
@click.option(
    "--attack",
    "attacks",
    multiple=True,
    metavar="NAME[:VARIANT]",
    help=f"Add an attack; may be repeated. There are: {_NAMES}.",
)
@click.option("--all-attacks", is_flag=True, help="Add every attack in every variant.")
@click.option(
    "--intensity",
    type=click.FloatRange(0.001, 1000.0),
    default=1.0,
    show_default=True,
    help="Multiplies the attackers' sources and requests.",
)
@click.option(
    "--machines/--no-machines",
    default=True,
    show_default=True,
    help="With health checks, crawlers and integrations.",
)
@click.option(
    "--out",
    default="-",
    show_default=True,
    metavar="FILE",
    help="JSON Lines; a name ending in .gz is compressed, - is standard output.",
)
def command(
    users: int,
    hours: float,
    start_hour: float,
    seed: int,
    attacks: tuple[str, ...],
    all_attacks: bool,
    intensity: float,
    machines: bool,
    out: str,
) -> None:
    """Generate traffic of normal users and of attackers, with labels.

    People come by a daily rhythm, log in (and mistype), browse, buy and write, many of them behind
    shared addresses; health checks, crawlers and integrations do their work. Attacks start somewhere
    between a tenth and six tenths of the time. Records are in the order of time, with label (0 benign,
    1 attack) and cls (who sent it).

    \b
    outrider simulate --users 500 --hours 24 --out day.jsonl.gz
    outrider simulate --hours 2 --start-hour 17 --attack brute_force --attack scanning | outrider replay -
    outrider simulate --all-attacks --seed 7 --out attacks.jsonl.gz
    """
    try:
        chosen = [Attack.parse(text) for text in attacks]
        if all_attacks:
            chosen += [Attack(name, variant) for name, variants in ATTACKS.items() for variant in variants]
        scenario = Scenario(
            users, hours, seed, tuple(chosen), machines=machines, intensity=intensity, start_hour=start_hour
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    console = Console(stderr=True)
    counts: Counter[tuple[int, str]] = Counter()
    clients: dict[str, set[str]] = {}
    progress = Progress(
        TextColumn("simulating"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[records]:,} records"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    try:
        with progress, JsonLinesWriter(out) as writer:
            task = progress.add_task("", total=scenario.end_ts - scenario.first_ts, records=0)
            for record in simulate(scenario):
                writer.write(record)
                cls = record.cls or ""
                counts[(record.label or 0, cls)] += 1
                clients.setdefault(cls, set()).add(record.client or "")
                if writer.count % 2000 == 0:
                    progress.update(
                        task, completed=(record.ts or 0.0) - scenario.first_ts, records=writer.count
                    )
    except RecordsError as error:
        raise click.ClickException(str(error)) from None
    table = Table(title=f"{writer.count:,} records")
    for name in ("who", "label", "requests", "addresses"):
        table.add_column(name, justify="left" if name == "who" else "right")
    for (label, cls), n in sorted(counts.items()):
        table.add_row(cls, str(label), f"{n:,}", f"{len(clients[cls]):,}")
    console.print(table)
