"""The request pipeline alone: one core, one request at a time, nothing of Python in between.

    python -m bench.pipeline [--rounds N] [--bundle FOLDER] [--json]

Each case (2,000 different requests of its kind in turn) is timed in interleaved rounds with a table of 1,000, 65,536
and 1,000,000 known clients, so that noise of the machine hits all alike. p50 and p99 in microseconds; by stage, p50.
"""
from __future__ import annotations

import json
import os
import platform
import random
import uuid
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from native.arenafile import ArenaFile
from native.engine import STAGES_NAMES, Engine, Models
from sidecar.bundle import load_bundle, prepare_runtime
from sidecar.config import Settings
from sidecar.core import DEFAULT_BUNDLE, default_cache
from sidecar.memory import memory_folder
from sidecar.policy import compile_policy

Request = tuple[str, str, list[tuple[str, str]], str | None]
WORDS = [
    "chair", "table", "lamp", "harbour", "oak", "linen", "folding", "garden", "green", "wool", "ceramic", "kettle",
    "summer", "delivery", "window", "brass", "notebook", "leather", "travel", "candle", "silver", "winter", "mirror",
    "basket", "cotton", "corner", "ladder", "market", "orange", "pepper",
]
AGENTS = (
    "Mozilla/5.0 (X11; Linux x86_64; rv:143.0) Gecko/20100101 Firefox/143.0",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 18_5 like Mac OS X) AppleWebKit/605.1.15 Version/18.5 Mobile Safari/604.1",
    "okhttp/4.12.0",
    "ShopApp/7.3.1 (Android 15; Pixel 9)",
)


def headers(rng: random.Random) -> list[tuple[str, str]]:
    """Eight, the values that differ between clients drawn anew for each request."""
    return [
        ("user-agent", rng.choice(AGENTS)),
        ("accept", "application/json"),
        ("accept-encoding", "gzip, br"),
        ("accept-language", rng.choice(("en-GB,en;q=0.8", "de-DE,de;q=0.9", "pt-BR"))),
        ("referer", f"https://shop.example/{rng.choice(WORDS)}/{rng.choice(WORDS)}?page={rng.randrange(40)}"),
        ("cookie", f"sid={rng.getrandbits(64):016x}; theme={rng.choice(('dark', 'light'))}"),
        ("x-request-id", str(uuid.UUID(int=rng.getrandbits(128)))),
        ("x-forwarded-for", f"192.0.2.{rng.randrange(256)}"),
    ]


def get(rng: random.Random) -> Request:
    words = "+".join(rng.choices(WORDS, k=rng.randrange(1, 4)))
    url = f"/api/v1/{rng.choice(WORDS)}s?q={words}&sort={rng.choice(WORDS)}_asc&page={rng.randrange(100)}"
    return "GET", url, headers(rng), None


def post(rng: random.Random) -> Request:
    """About 1 KB of JSON."""

    def title(n: int) -> str:
        return " ".join(rng.choices(WORDS, k=n))

    order = {
        "customer": {"id": rng.randrange(10**6), "name": title(2).title(), "email": f"{title(1)}@mail.example"},
        "items": [
            {"sku": f"SKU-{rng.randrange(10**5)}", "title": title(4), "quantity": rng.randrange(9), "price": 49.5}
            for _ in range(8)
        ],
        "note": title(12) + "; ring twice, the bell doesn't work & the dog is friendly.",
        "delivery": {"street": f"{rng.randrange(99)} {title(2)}", "zip": str(rng.randrange(10**5)), "country": "DK"},
    }
    body = json.dumps({"order": order})
    return "POST", "/api/v1/orders", [*headers(rng), ("content-type", "application/json")], body


def attack(rng: random.Random) -> Request:
    n = rng.randrange(10**4)
    url = f"/api/v1/{rng.choice(WORDS)}s?id={n}%27%20UNION%20SELECT%20{rng.choice(WORDS)},b%20FROM%20users--%20"
    return "GET", url, headers(rng), None


CASES = {"GET, 3 query values": get, "POST, 1 KB of JSON": post, "GET, SQL injection": attack}
VARIANTS = 2_000
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
                times[case, clients].append(engine.time_stages(requests[case], rounds // slices, clients))
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
    table = Table(title=f"us per request, batch 1, one core ({platform.machine()}, {_processor()})")
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


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"


if __name__ == "__main__":
    command()
