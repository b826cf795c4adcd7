"""`outrider replay`: what would have been done, had Outrider been there?"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack

import click
import orjson
from rich.console import Console
from rich.text import Text

from sidecar.commands.offline import core_for, inputs, progress_to, stop_on_error, tell_reader
from sidecar.records import JsonLinesWriter


@click.command(
    name="replay", short_help="Replay logs through time, per client, and say who would have been refused."
)
@inputs
@click.option("--json", "as_json", is_flag=True, help="The summary as one JSON object on standard output.")
@click.option("--out", metavar="FILE", help="Also write every decision record (JSON Lines, .gz by name).")
@click.option(
    "--top", type=click.IntRange(1, 10_000), default=20, show_default=True, help="Rows of the long tables."
)
@click.option(
    "--reorder",
    type=click.IntRange(1, 10_000_000),
    default=200_000,
    show_default=True,
    help="Records held in memory to put them into the order of time.",
)
def command(
    files: tuple[str, ...],
    format: str,
    strict: bool,
    config: str | None,
    bundle: str | None,
    models: bool,
    limit: int | None,
    as_json: bool,
    out: str | None,
    top: int,
    reorder: int,
) -> None:
    """Replay logs through time, per client, and say who would have been refused, when and why.

    Reads JSON Lines, NGINX and Apache access logs (common and combined), Envoy JSON access logs and HAR,
    plain or gzip, several files merged by time. Requests are decided on at the times in the log;
    responses count for the client when they came. Refused means an action of throttle, challenge or
    block, whether or not service.mode enforces it; in enforce mode the service does not see
    what is refused, so its responses are left out. Latency budgets are off.

    \b
    outrider replay access.log access.log.1.gz
    outrider replay day.jsonl.gz -c outrider.yaml --out decisions.jsonl.gz
    outrider replay access.log --json | jq '.refused_clients[].client'
    """
    if as_json and out == "-":
        raise click.UsageError("--json and --out - would both write to standard output")
    console = Console(stderr=True)
    with stop_on_error():
        core = core_for(config, bundle, models)
        from sidecar.reasons import sentence
        from sidecar.replay import Decider, Summary, in_time
        from sidecar.replay.render import show

        decider, summary = Decider(core), Summary()
        records, readers, disorder = in_time(files, format, strict, reorder)
        started = time.monotonic()
        try:
            with ExitStack() as stack:
                writer = stack.enter_context(JsonLinesWriter(out)) if out else None
                step = stack.enter_context(progress_to(console, "replaying"))
                for decided in decider.decide(step(records, limit)):
                    output = decider.output(decided)
                    summary.add(decided, output)
                    if writer is not None:
                        writer.write_object(output)
        finally:
            for reader in readers:
                tell_reader(console, reader)
            core.close()
        seconds = time.monotonic() - started
        if disorder.late:
            console.print(
                Text(
                    f"{disorder.late:,} records were further from their place in time than --reorder "
                    f"{reorder:,} reaches; they were replayed late"
                )
            )
    if as_json:
        sys.stdout.buffer.write(
            orjson.dumps(summary.json(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        )
        sys.stdout.buffer.flush()
    else:
        # decisions on standard output leave no room for tables there
        show(console if out == "-" else Console(), summary, seconds, top, sentence)
