"""outrider bench"""

from __future__ import annotations

import importlib
import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

import click

HOST_NAMES = (
    "bare", "null_native", "native", "grpcio", "envoy_plugin",
    "nginx_bare", "nginx_plugin", "nginx_auth_request", "nginx_modsecurity",
)  # fmt: skip
CASE_NAMES = ("get", "post_1k", "post_16k")
# name -> (module with a click command named `command`, one-line help)
SUBCOMMANDS = {
    "budgets": ("bench.budgets", "Latency budgets under load: what is skipped, what holds."),
    "models": ("bench.models", "Models at batch 1, against other ways to run them."),
    "pipeline": ("bench.pipeline", "The request pipeline alone, stage by stage."),
    "scaling": ("bench.scaling", "Whether a second worker of the proxy adds its throughput."),
}
EXIT_CANNOT = 3


class Benches(click.Group):
    """The subcommands are imported when asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in SUBCOMMANDS:
            return None
        module = SUBCOMMANDS[name][0]
        try:
            command: click.Command = importlib.import_module(module).command
        except ModuleNotFoundError as error:
            if error.name in (module, "bench"):
                raise click.ClickException(missing(module)) from error
            raise click.ClickException(f"outrider bench {name} needs the package {error.name}") from error
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Other benchmarks"):
            formatter.write_dl([(name, SUBCOMMANDS[name][1]) for name in sorted(SUBCOMMANDS)])


def missing(module: str) -> str:
    return (
        f"{module} isn't part of this installation. The benchmarks live in the checkout's bench/ folder: run "
        "from there, or install the checkout with `pip install -e .`"
    )


@click.group(
    cls=Benches, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option("--host", "hosts", multiple=True, type=click.Choice(HOST_NAMES), help="Only these (repeat); all if none.")
@click.option("--case", "cases", multiple=True, type=click.Choice(CASE_NAMES), help="Only these (repeat); all if none.")
@click.option(
    "--connections",
    multiple=True,
    type=click.IntRange(1, 4096),
    help="For the closed loop (repeat).  [default: 32; with --soak 256]",
)
@click.option(
    "--rate",
    "rates",
    multiple=True,
    type=click.FloatRange(10, 50_000),
    help="Arrivals per second (repeat); chosen from the measured ceiling if none.",
)
@click.option("--mode", type=click.Choice(("both", "closed", "open")), default="both", show_default=True)
@click.option(
    "--duration",
    type=click.IntRange(1, 600),
    help="Seconds of each slice of the closed loop, half of it at constant rates.  [default: 2]",
)
@click.option("--rounds", type=click.IntRange(1, 100), help="Rounds over all hosts.  [default: 3]")
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Of each proxy.")
@click.option("--quick", is_flag=True, help="A minute, to see that it runs: two cases, one round, one rate.")
@click.option("--soak", is_flag=True, help="A million requests; is each answered, does memory grow?")
@click.option(
    "--requests", type=click.IntRange(100, 1_000_000_000), default=1_000_000, show_default=True, help="For --soak."
)
@click.option("--json", "as_json", is_flag=True, help="Rows as a JSON list instead of tables.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write a report there.")
@click.pass_context
def command(ctx: click.Context, /, **given: Any) -> None:
    """Load benchmarks of the whole way through Envoy and NGINX.

    Starts an upstream, proxies and sidecars on loopback, loads them with wrk (closed loop: the ceiling) and h2load
    (constant arrival rates: waiting counts; Envoy only) and compares, in one interleaved run: Envoy alone, Envoy with
    an empty native ext_proc server (the floor), Outrider over its native transport, over grpcio, and inside Envoy;
    NGINX alone, with Outrider inside, with auth_request, and with ModSecurity and the OWASP CRS. What isn't installed
    is left out and said. The default run takes some seven minutes.

    \b
    outrider bench --quick                         does it run here?
    outrider bench --html report.html              tables, and a report to look at
    outrider bench --case get --connections 32 --connections 256 --mode closed
    outrider bench --soak                          a million requests at 256 connections
    outrider bench pipeline                        the core alone

    Exit status: 0 measured; 1 --soak failed; 3 something that it needs isn't there, or failed.
    """
    if ctx.invoked_subcommand is not None:
        return
    try:
        importlib.import_module("bench")
    except ModuleNotFoundError as error:
        raise click.ClickException(missing("bench")) from error
    from bench.hosts import HostError
    from bench.load import STOP, LoadError
    from sidecar.demo.envoy import DemoError

    if given["html"] is not None and not given["html"].absolute().parent.is_dir():
        raise click.UsageError(f"--html: there is no folder {given['html'].absolute().parent}")
    if any(not math.isfinite(rate) for rate in given["rates"]):
        raise click.UsageError("--rate: a finite number of requests per second is wanted")

    def told(*_: object) -> None:
        for number in handlers:  # a second one must not interrupt the tidying up
            signal.signal(number, signal.SIG_IGN)
        STOP.set()
        raise KeyboardInterrupt

    STOP.clear()
    handlers = {n: signal.signal(n, told) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        status = soak(given) if given["soak"] else compare(given)
    except (HostError, LoadError, DemoError) as error:
        click.echo(f"outrider bench: {error}", err=True)
        status = EXIT_CANNOT
    except KeyboardInterrupt:
        click.echo("outrider bench: stopped; everything it had started is ended", err=True)
        status = 130
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    sys.exit(status)


def write_page(path: Path, page: str, progress: Any) -> None:
    """The report; the figures have been shown already, so that a full disk loses no run."""
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"--html: can't write {path}: {error.strerror}") from error
    progress.print(f"report: {path}", markup=False, highlight=False)


def compare(given: dict[str, Any]) -> int:
    from bench import proxy, report, show, verdicts
    from bench.hosts import is_nginx

    quick, wanted = given["quick"], [name for name in HOST_NAMES if name in given["hosts"] or not given["hosts"]]
    if given["mode"] == "open":
        refused = [name for name in given["hosts"] if is_nginx(name)]
        if refused:
            raise click.UsageError(f"--mode open: hosts of NGINX have a closed loop only ({', '.join(refused)})")
        wanted = [name for name in wanted if not is_nginx(name)]
    plan = proxy.Plan(
        hosts=tuple(wanted),
        cases=tuple(name for name in CASE_NAMES if name in given["cases"]) or (CASE_NAMES[:2] if quick else CASE_NAMES),
        connections=tuple(dict.fromkeys(given["connections"])) or (32,),
        rates=tuple(sorted(set(given["rates"]))) or ((200.0,) if quick else ()),
        duration_s=given["duration"] or (1 if quick else 2),
        rounds=given["rounds"] or (1 if quick else 3),
        workers=given["workers"],
        closed=given["mode"] != "open",
        opened=given["mode"] != "closed",
    )
    progress = show.console_for(stderr=True)
    run = with_status(progress, lambda say: proxy.run_plan(plan, set(given["hosts"]), say))
    if plan.rounds < 3:
        run.notes.append("Fewer than three rounds: this shows that it runs, not how fast.")
    rows, said = run.rows(), verdicts.verdicts(run)
    if given["as_json"]:
        print(json.dumps(rows, indent=1))
    else:
        show.report(show.console_for(), rows, run.facts, run.missing, said)
    if given["html"] is not None:
        write_page(given["html"], report.render(rows, run.facts, run.missing, said), progress)
    return 0


def soak(given: dict[str, Any]) -> int:
    from bench import hosts, load, proxy, report, show
    from bench import soak as endurance
    from bench.rig import Rig

    chosen = [name for name in given["hosts"] if name in ("native", "grpcio")]
    if given["hosts"] and len(chosen) != 1:
        raise click.UsageError("--soak takes one host: --host native or --host grpcio")
    if given["rates"]:
        raise click.UsageError("--soak is a closed loop: it takes no --rate")
    if not chosen:
        try:
            hosts.transport("native")
            chosen = ["native"]
        except hosts.HostError as error:
            click.echo(f"outrider bench: {error}: soaking grpcio", err=True)
            chosen = ["grpcio"]
    load.find("h2load")
    result = endurance.Soak(
        chosen[0],
        given["requests"],
        (given["connections"] or (256,))[0],
        tuple(name for name in CASE_NAMES if name in given["cases"] or not given["cases"]),
    )
    progress = show.console_for(stderr=True)

    def tell(say: Any, r: endurance.Soak) -> None:
        if progress.is_terminal or len(r.memory) % 10 == 0:
            say(f"{r.done:,} of {r.requests:,} requests, {r.memory[-1][2] / 1024:.1f} MiB private")

    def work(say: Any) -> endurance.Soak:
        say("starting")
        with Rig(chosen, set(chosen), given["workers"]) as rig:
            return endurance.soak(
                rig,
                rig.hosts[0],
                result,
                lambda r: tell(say, r),
            )

    with_status(progress, work)
    plan = proxy.Plan(tuple(chosen), result.cases, (result.connections,), (), 0, 0, given["workers"])
    facts = proxy.facts(plan)
    facts["method"] = f"closed loop with h2load, {given['workers']} Envoy worker(s), everything on one machine"
    if given["html"] is not None:
        write_page(given["html"], report.render([], facts, soak=result), progress)
    if given["as_json"]:
        print(json.dumps([result.as_json()], indent=1))
    else:
        show.soak_report(show.console_for(), result, facts)
    return 1 if result.problems() else 0


def with_status(console: Any, work: Any) -> Any:
    """Shows what is being done: a line that changes on a terminal, else a line per step where it changes."""
    if console.is_terminal:
        with console.status("", spinner="line") as status:
            return work(lambda text: status.update(text))
    return work(lambda text: console.print(text, style="dim", markup=False, highlight=False))
