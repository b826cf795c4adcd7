"""The request pipeline alone: one core, one request at a time, nothing of Python in between.

    outrider bench pipeline [--rounds N] [--bundle FOLDER] [--json]   (or python -m bench.pipeline)

Each case (2,000 different requests of its kind in turn) is timed in interleaved rounds with a table of 1,000, 65,536
and 1,000,000 known clients, so that noise of the machine hits all alike. p50 and p99 in microseconds; by stage, p50.
"""
from __future__ import annotations

import json
import os
import platform
import random
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.traffic import attack, get, post, post_16k
from native.arenafile import ArenaFile
from native.engine import STAGES_NAMES, Engine, ModelError, Models
from sidecar.bundle import BundleError, load_bundle, prepare_runtime
from sidecar.commands.version import cpu_model
from sidecar.config import Settings
from sidecar.core import DEFAULT_BUNDLE, default_cache
from sidecar.memory import memory_folder
from sidecar.policy import compile_policy

CASES = {
    "GET, 3 query values": get,
    "POST, 1 KB of JSON": post,
    "POST, 16 KB of JSON": post_16k,
    "GET, SQL injection": attack,
}
SHARES = {"POST, 16 KB of JSON": 0.1}  # of the rounds: a long one tells as much in fewer
VARIANTS = 2_000
CLIENTS = (1_000, 65_536, 1_000_000)


@click.command(
    help="The request pipeline alone: one core, one request at a time, stage by stage.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--rounds",
    default=20_000,
    type=click.IntRange(100, 10_000_000),
    show_default=True,
    help="Requests per case and table size.",
)
@click.option("--bundle", default=str(DEFAULT_BUNDLE), show_default=True, metavar="FOLDER")
@click.option("--json", "as_json", is_flag=True, help="Rows with case, clients, p50_us, p99_us, stages.")
def command(rounds: int, bundle: str, as_json: bool) -> None:
    models = Models()
    try:
        models.load(prepare_runtime(load_bundle(Path(bundle)), default_cache()))
    except (BundleError, ModelError) as error:
        raise click.ClickException(f"--bundle: {error}") from error
    engines: dict[int, Engine] = {}
    for clients in CLIENTS:
        path = Path(memory_folder(clients * 4096)) / f"outrider-bench-{os.getpid()}-{clients}.arena"
        arena = ArenaFile.create(path, clients=1 << 21 if clients > 65_536 else 1 << 17)
        path.unlink()
        policy = compile_policy(Settings())
        for detector in policy["detectors"][:5]:
            detector["enabled"] = False  # a flood from few addresses would be held: measure the whole way
        arena.write_policy(policy)
        engines[clients] = Engine(arena, models, unhurried=True)
    rng = random.Random(1)
    requests = {case: [make(rng) for _ in range(VARIANTS)] for case, make in CASES.items()}
    for clients, engine in engines.items():  # make every client known: its page exists, its windows run
        engine.time_stages([("GET", "/", [], None)], min(clients * 3, 3_000_000), clients)
    times: dict[tuple[str, int], list[Any]] = {(case, n): [] for case in CASES for n in CLIENTS}
    slices = 20
    for _ in range(slices):
        for case in CASES:
            for clients, engine in engines.items():
                n = max(1, int(rounds * SHARES.get(case, 1.0)) // slices)
                times[case, clients].append(engine.time_stages(requests[case], n, clients))
    rows = []
    for (case, clients), parts in times.items():
        ns = np.concatenate(parts) / 1000
        p50, p99 = (np.percentile(ns, q, axis=0) for q in (50, 99))
        rows.append(
            {
                "case": case,
                "clients": clients,
                "p50_us": round(float(p50[-1]), 2),
                "p99_us": round(float(p99[-1]), 2),
                "stages": {name: round(float(p50[i]), 2) for i, name in enumerate(STAGES_NAMES)},
            }
        )
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(title=f"us per request, batch 1, one core ({platform.machine()}, {cpu_model()})")
    short = {"random_forest": "forest", "behaviour": "behav.", "blocklist": "lists"}
    for column in ("case", "clients", "p50", "p99", *(short.get(name, name) for name in STAGES_NAMES)):
        table.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["case"],
            f"{row['clients']:,}",
            f"{row['p50_us']:.1f}",
            f"{row['p99_us']:.1f}",
            *(f"{row['stages'][name]:.2f}" for name in STAGES_NAMES),
        )
    console = Console()
    Console(width=max(console.width, 110)).print(table)


if __name__ == "__main__":
    command()
