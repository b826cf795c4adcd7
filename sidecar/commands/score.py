"""`outrider score`: request records in, decision records out."""

from __future__ import annotations

import time
from collections import Counter

import click
from rich.console import Console
from rich.text import Text

from sidecar.commands.offline import core_for, inputs, progress_to, stop_on_error, tell_reader
from sidecar.records import JsonLinesWriter, read


@click.command(name="score", short_help="Score request records one by one and write decision records.")
@inputs
@click.option(
    "--out",
    default="-",
    show_default=True,
    metavar="FILE",
    help="Decision records as JSON Lines; a name ending in .gz is compressed, - is standard output.",
)
def command(
    files: tuple[str, ...],
    format: str,
    strict: bool,
    config: str | None,
    bundle: str | None,
    models: bool,
    limit: int | None,
    out: str,
) -> None:
    """Score request records one by one and write decision records.

    Reads JSON Lines, NGINX and Apache access logs (common and combined), Envoy JSON access logs and HAR,
    plain or gzip. The records are decided on in the order of the file: by their text, and by what their
    client did before where they say who asked and when. Use replay for logs that are not in the
    order of time, and for a summary.

    \b
    outrider score requests.jsonl.gz --out decisions.jsonl.gz
    outrider score capture.har -c outrider.yaml | jq 'select(.action == "block")'
    """
    console = Console(stderr=True)
    with stop_on_error():
        core = core_for(config, bundle, models)
        from sidecar.replay import Decider

        decider = Decider(core)
        reader = read(files, format, strict)
        actions: Counter[str] = Counter()
        started = time.monotonic()
        try:
            with progress_to(console, "scoring") as step, JsonLinesWriter(out) as writer:
                for decided in decider.decide(step(reader, limit)):
                    writer.write_object(decider.output(decided))
                    actions[decided.action] += 1
        finally:
            tell_reader(console, reader)
            core.close()
    seconds = time.monotonic() - started
    counts = ", ".join(f"{n:,} {action}" for action, n in actions.most_common())
    console.print(Text(f"{actions.total():,} requests in {seconds:.1f} s: {counts or 'nothing to do'}"))
