"""Whether a latency budget holds on large bodies, and what is skipped for it: the engine alone, budgets honoured.

    python -m bench.budgets [--budget 50us] [--body 16KiB] [--seconds 4] [--no-shed] [--json]

Each case sends POSTs with bodies of its kind (200 different ones in turn, 10,000 clients) from one thread. A first
table is what `outrider latency` shows of this arena; the second compares with the same requests without a budget.
A body of 16 KiB takes 50 to 200 us to read whole, so that a budget of 50 us asks for skipping.
"""
from __future__ import annotations

import base64
import json
import os
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from native.arenafile import ArenaFile
from native.engine import Engine, Models
from sidecar.bundle import load_bundle, prepare_runtime
from sidecar.commands.latency import duration, left_out, share, table_of
from sidecar.config import ConfigError, Settings, loads
from sidecar.core import DEFAULT_BUNDLE, default_cache
from sidecar.latency import RouteTimes, take, times
from sidecar.memory import memory_folder
from sidecar.policy import compile_policy
from sidecar.units import UnitError, format_duration, parse_duration, parse_size

WORDS = ("chair", "table", "lamp", "harbour", "oak", "linen", "folding", "garden", "Grün", "wool", "kettle", "brass")
VARIANTS, CLIENTS, SLICE = 200, 10_000, 500


def prose(rng: random.Random, size: int) -> str:
    words = []
    while size > 0:
        words.append(rng.choice(WORDS))
        size -= len(words[-1]) + 1
    return " ".join(words)


def records(rng: random.Random, size: int) -> str:
    """A list of orders, as APIs exchange them."""
    orders: list[dict[str, Any]] = []
    while size > 0:
        orders.append(
            {
                "id": rng.randrange(10**6),
                "title": prose(rng, 24),
                "price": rng.randrange(10**4) / 100,
                "tags": [f"{rng.choice(WORDS)}-{rng.randrange(99)}" for _ in range(4)],
                "gift": rng.random() < 0.5,
            }
        )
        size -= len(json.dumps(orders[-1])) + 2
    return json.dumps(orders)


def numbers(rng: random.Random, size: int) -> str:
    return json.dumps({"values": [rng.randrange(10**4) for _ in range(size // 6)]})


def one_string(rng: random.Random, size: int) -> str:
    return json.dumps({"text": prose(rng, size)}, ensure_ascii=False)


def escaped(rng: random.Random, size: int) -> str:
    return json.dumps({"text": prose(rng, size // 2).replace(" ", '\n"é')})


def nested(rng: random.Random, size: int) -> str:
    return json.dumps({"message": json.dumps({"body": records(rng, size // 2)})})


def form(rng: random.Random, size: int) -> str:
    return "&".join(f"field{i}={rng.randrange(10**4)}" for i in range(size // 14))


def xml(rng: random.Random, size: int) -> str:
    items = "".join(f"<item n='{i}'>{prose(rng, 20)}</item>" for i in range(size // 42))
    return f"<order>{items}</order>"


def in_base64(rng: random.Random, size: int) -> str:
    return base64.b64encode(prose(rng, size * 3 // 4).encode()).decode()


JSON, XML = "application/json", "application/xml"
CASES: dict[str, tuple[Callable[[random.Random, int], str], str]] = {
    "JSON, records": (records, JSON),
    "JSON, numbers": (numbers, JSON),
    "JSON, one string": (one_string, JSON),
    "JSON, escapes": (escaped, JSON),
    "JSON in JSON": (nested, JSON),
    "form": (form, "application/x-www-form-urlencoded"),
    "XML": (xml, XML),
    "base64": (in_base64, "text/plain"),
}


def requests(case: str, size: int) -> list[tuple[str, str, list[tuple[str, str]], str]]:
    make, kind = CASES[case]
    rng = random.Random(case)
    headers = [("content-type", kind), ("user-agent", "ShopApp/7.3.1 (Android 15)"), ("accept", "*/*")]
    return [("POST", "/api/v1/orders", headers, make(rng, size)) for _ in range(VARIANTS)]


def engines(budget_us: int, shed: bool, models: Models) -> tuple[ArenaFile, Engine, Engine]:
    """An arena of its own for each case, an engine that minds the budget and one that doesn't."""
    path = Path(memory_folder(256 << 20)) / f"outrider-bench-{os.getpid()}.arena"
    arenas = []
    for _ in range(2):
        arena = ArenaFile.create(path, clients=1 << 15)
        path.unlink()
        policy = compile_policy(loads(f"latency: {{budget: {budget_us}us, shed: {str(shed).lower()}}}"))
        for detector in policy["detectors"][:5]:
            detector["enabled"] = False  # a flood from few addresses would be held: measure the whole way
        arena.write_policy(policy)
        arenas.append(arena)
    return arenas[0], Engine(arenas[0], models), Engine(arenas[1], models, unhurried=True)


def through_envoy(budget: str, size: int, seconds: float) -> list[RouteTimes]:
    """The same in a serving sidecar behind a real Envoy, 32 connections asking as fast as they can; what
    `outrider latency` shows afterwards. HostError or LoadError where something is missing."""
    from bench import load, traffic
    from bench.rig import Rig

    over = {
        "latency": {"budget": "1ms", "skip": list(Settings().latency.skip)},
        "routes": [{"name": "orders", "path": "/api/v1/orders", "methods": ["POST"], "budget": budget}],
    }
    with Rig(["native"], {"native"}, over=over) as rig:
        host = rig.hosts[0]
        sent = host.folder / "requests"
        traffic.write_raw(list(requests("JSON, records", size)), sent)
        load.closed(host.url, sent, 32, max(1, round(seconds)))
        return [times(r) for r in take(ArenaFile.open(host.folder / "arena")).routes if r["name"] == "orders"]


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--budget", default="50us", show_default=True)
@click.option("--body", default="16KiB", show_default=True, help="Size of each body.")
@click.option("--seconds", type=click.FloatRange(0.1, 3600), default=4.0, show_default=True, help="For each case.")
@click.option("--shed/--no-shed", default=True, show_default=True, help="As latency.shed.")
@click.option("--envoy", is_flag=True, help="In a serving sidecar behind Envoy (needs wrk), JSON records only.")
@click.option("--json", "as_json", is_flag=True, help="Rows with case, requests, p50_us, p99_us, over_share, ...")
def command(budget: str, body: str, seconds: float, shed: bool, envoy: bool, as_json: bool) -> None:
    try:
        budget_us, size = parse_duration(budget), parse_size(body)
        loads(f"latency: {{budget: {budget}}}")
    except (UnitError, ConfigError) as error:
        raise click.UsageError(f"--budget or --body: {error}") from error
    if envoy:
        from bench.hosts import HostError
        from bench.load import LoadError

        try:
            shown = through_envoy(budget, size, seconds)
        except (HostError, LoadError) as error:
            raise click.ClickException(str(error)) from error
        if as_json:
            print(json.dumps([row.record() for row in shown], indent=1))
        else:
            wide = Console()
            Console(width=max(wide.width, 110)).print(table_of(shown, True, f"Behind Envoy, bodies of {body}"))
        return
    models = Models()
    models.load(prepare_runtime(load_bundle(Path(DEFAULT_BUNDLE)), default_cache()))
    rows, routes = [], []
    for case in CASES:
        sent = requests(case, size)
        arena, hurried, unhurried = engines(budget_us, shed, models)
        first = hurried.time_stages(sent, 100, CLIENTS)[:, -1] / 1000
        whole = [unhurried.time_stages(sent, VARIANTS, CLIENTS)[:, -1]]
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            hurried.time_stages(sent, SLICE, CLIENTS)
        whole.append(unhurried.time_stages(sent, VARIANTS, CLIENTS)[:, -1])
        route = times(take(arena).routes[0])
        routes.append(route)
        rows.append(
            {
                "case": case,
                "budget_us": budget_us,
                "body_bytes": len(sent[0][3].encode()),
                "unhurried_p50_us": round(float(np.percentile(np.concatenate(whole), 50)) / 1000, 2),
                "overruns_in_first_100": int((first > budget_us).sum()),
                **{k: v for k, v in route.record().items() if k not in ("route", "path", "budget_us", "stages")},
            }
        )
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(title=f"Budget {format_duration(budget_us)}, bodies of {body} ({platform.machine()})")
    for column in ("case", "whole p50", "p50", "p99", "p99.9", "over", "first 100", "skipped", "shed now", "sheds"):
        left = column in ("case", "skipped", "shed now")
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "skipped")
    for row, route in zip(rows, routes, strict=True):
        table.add_row(
            row["case"],
            duration(row["unhurried_p50_us"]),
            duration(route.p50_us),
            duration(route.p99_us),
            duration(route.p999_us),
            share(route.over),
            str(row["overruns_in_first_100"]),
            left_out(route).replace("\n", ", "),
            str(len(route.shed_now)),
            f"{route.sheds}/{route.taken_back}",
        )
    console = Console()
    Console(width=max(console.width, 150)).print(table)


if __name__ == "__main__":
    command()
