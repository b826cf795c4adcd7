"""How soon simulated attackers are found by what they do, and who is refused by mistake.

    python bench/behaviour.py [--seeds 10] [--config outrider.yaml]

Each attack runs against people and machines for three hours, once per seed, without text models; then
quiet days without any attack. Prints two tables. Not timed: the figures are counts.
"""

from __future__ import annotations

import statistics
from collections import Counter

import click
from rich.console import Console
from rich.table import Table

from sidecar.replay import Decider, Summary, open_offline
from sidecar.simulate import ATTACKS, Attack, Scenario, simulate


def replay(scenario: Scenario, config: str | None) -> Summary:
    core = open_offline(config, load_models=False)
    decider, summary = Decider(core), Summary()
    for decided in decider.decide(simulate(scenario)):
        summary.add(decided, decider.output(decided))
    core.close()
    return summary


@click.command()
@click.option("--seeds", type=click.IntRange(1), default=10, show_default=True)
@click.option("--config", type=click.Path(exists=True, dir_okay=False))
def main(seeds: int, config: str | None) -> None:
    mistakes: Counter[tuple[str, str]] = Counter()
    found = Table(title=f"Attackers, {seeds} seeds each", title_justify="left")
    for column in ("attack", "clients", "refused", "median until", "worst until", "requests refused"):
        found.add_column(
            column, justify="left" if column == "attack" else "right", no_wrap=column == "attack"
        )
    for name, variants in ATTACKS.items():
        for variant in variants:
            clients, until, requests, refused = 0, [], 0, 0
            for seed in range(seeds):
                attacks = (Attack(name, variant),)
                summary = replay(Scenario(60, 3.0, 100 + seed, attacks, start_hour=seed * 5 % 20), config)
                for client in summary.clients.values():
                    if client.label == 1:
                        clients += 1
                        until += [client.requests_until_refused] if client.refused else []
                    elif client.refused:
                        mistakes[client.cls or "", max(client.reasons or ("",))] += 1
                hostile = [group for (label, _), group in summary.classes.items() if label == 1]
                requests += sum(group.requests for group in hostile)
                refused += sum(group.refused for group in hostile)
            found.add_row(
                f"{name}:{variant}",
                f"{clients:,}",
                f"{len(until):,}",
                f"{statistics.median(until):,.0f}" if until else "",
                f"{max(until, default=0):,}",
                f"{refused / max(1, requests):.1%}",
            )
    total = 0
    for seed in range(seeds):
        summary = replay(Scenario(300, 24.0, 200 + seed), config)
        total += summary.requests
        for _, client in summary.refused_clients():
            mistakes[client.cls or "", max(client.reasons or ("",))] += 1
    console = Console()
    console.print(found)
    wrong = Table(title=f"Refused by mistake (and in {total:,} requests of quiet days)", title_justify="left")
    for column in ("who", "reason", "clients"):
        wrong.add_column(column)
    for (who, reason), n in mistakes.most_common():
        wrong.add_row(who, reason, f"{n:,}")
    console.print(wrong if mistakes else f"nobody was refused by mistake (quiet days: {total:,} requests)")


if __name__ == "__main__":
    main()
