"""The request pipeline alone: one core, one request at a time, nothing of Python in between.

    python -m bench.pipeline [--rounds N] [--bundle FOLDER] [--json]

Each case is timed in interleaved rounds with a table of 1,000, 65,536 and 1,000,000 clients, so that noise of
the machine hits all alike. p50 and p99 in microseconds, in all and by stage.
"""
from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import click
import numpy as np
from native.engine import STAGES_NAMES, ArenaFile, Engine, Models
from rich.console import Console
from rich.table import Table

from sidecar.bundle import load_bundle, prepare_runtime
from sidecar.config import Settings
from sidecar.core import DEFAULT_BUNDLE, default_cache
from sidecar.policy import compile_policy

BROWSER = [
    ("user-agent", "Mozilla/5.0 (X11; Linux x86_64; rv:143.0) Gecko/20100101 Firefox/143.0"),
    ("accept", "application/json"),
    ("accept-encoding", "gzip, br"),
    ("accept-language", "en-GB,en;q=0.8"),
    ("referer", "https://shop.example/catalogue?page=3"),
    ("cookie", "sid=4f1c2a9b77d04e; theme=dark"),
    ("x-request-id", "0b9f8a52-2f7b-4a6e-9b52-6a2b7c9d1e3f"),
    ("x-forwarded-for", "192.0.2.10"),
]
BODY = json.dumps(
    {
        "order": {
            "customer": {"id": 48213, "name": "Margarethe Olufsen", "email": "m.olufsen@mail.example"},
            "items": [
                {"sku": f"SKU-{1000 + i}", "title": f"Folding chair, oak, model {i}", "quantity": i + 1, "price": 49.5}
                for i in range(8)
            ],
            "note": "Please ring twice; the bell at the gate doesn't work & the dog is friendly.",
            "delivery": {"street": "12 Harbour Lane", "city": "Aarhus", "zip": "8000", "country": "DK"},
        }
    }
)
CASES: dict[str, tuple[str, str, list[tuple[str, str]], str | None]] = {
    "GET, 3 query values, 8 headers": ("GET", "/api/v1/products?category=chairs&sort=price_asc&page=2", BROWSER, None),
    f"POST, {len(BODY)} B of JSON": (
        "POST",
        "/api/v1/orders",
        [*BROWSER, ("content-type", "application/json")],
        BODY,
    ),
    "GET, an attack": ("GET", "/api/v1/products?id=1%27%20UNION%20SELECT%20a,b%20FROM%20users--%20", BROWSER, None),
}
CLIENTS = (1_000, 65_536, 1_000_000)


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--rounds", default=20_000, show_default=True, help="Requests per case and table size.")
@click.option("--bundle", default=str(DEFAULT_BUNDLE), show_default=True, metavar="FOLDER")
@click.option("--json", "as_json", is_flag=True, help="Rows with case, clients, p50_us, p99_us, stages.")
def command(rounds: int, bundle: str, as_json: bool) -> None:
    models = Models()
    models.load(prepare_runtime(load_bundle(Path(bundle)), default_cache()))
    engines: dict[int, Engine] = {}
    for clients in CLIENTS:
        path = Path("/dev/shm") / f"outrider-bench-{os.getpid()}-{clients}.arena"
        arena = ArenaFile.create(path, clients=1 << 21 if clients > 65_536 else 1 << 17)
        path.unlink()
        policy = compile_policy(Settings())
        for detector in policy["detectors"][:5]:
            detector["enabled"] = False  # a flood from few addresses would be held: measure the whole way
        arena.write_policy(policy)
        engines[clients] = Engine(arena, models, unhurried=True)
    method, url, headers, _ = next(iter(CASES.values()))
    for clients, engine in engines.items():  # make every client known: its page exists, its windows run
        engine.time_stages(min(clients * 3, 3_000_000), method, url.split("?")[0], [], None, clients=clients)
    times: dict[tuple[str, int], list[Any]] = {(case, n): [] for case in CASES for n in CLIENTS}
    slices = 20
    for _ in range(slices):
        for case, (method, url, headers, body) in CASES.items():
            for clients, engine in engines.items():
                times[case, clients].append(
                    engine.time_stages(rounds // slices, method, url, headers, body, clients=clients)
                )
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
    table = Table(title=f"The pipeline, batch 1, one core ({platform.machine()}, {_processor()})")
    for column in ("case", "clients", "p50 us", "p99 us", *(f"{name}" for name in STAGES_NAMES)):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        table.add_row(
            row["case"],
            f"{row['clients']:,}",
            f"{row['p50_us']:.1f}",
            f"{row['p99_us']:.1f}",
            *(f"{row['stages'][name]:.2f}" for name in STAGES_NAMES),
        )
    Console().print(table)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"


if __name__ == "__main__":
    command()
