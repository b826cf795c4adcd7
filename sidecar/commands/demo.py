"""outrider demo"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--once", is_flag=True, help="Send the tour's traffic, print the table and end.")
@click.option("--observe", is_flag=True, help="Decide but refuse nothing (not with --once).")
@click.option(
    "--bundle",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="A model bundle to use instead of the default one.",
)
@click.option("--plugin", is_flag=True, help="Outrider inside Envoy, as a module, instead of behind ext_proc.")
@click.option("--keep", is_flag=True, help="Keep the folder with configurations and logs.")
def command(once: bool, observe: bool, bundle: Path | None, plugin: bool, keep: bool) -> None:
    """A tour: demo API, Envoy and the sidecar, with traffic through them.

    Starts all three on loopback and shows decisions as they happen until Ctrl-C. With --once it sends
    benign and hostile requests itself, prints what was answered and why, and ends with status 1 if any
    answer wasn't as promised.

    \b
    outrider demo
    outrider demo --once
    outrider demo --observe          decide, but let everything pass
    outrider demo --once --plugin    the same tour with Outrider inside Envoy
    """
    from rich.console import Console

    from sidecar.demo.envoy import DemoError, find_envoy
    from sidecar.demo.stack import Stack
    from sidecar.plugins import PluginError

    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # into a file: the table unfolded
    if once and observe:
        raise click.UsageError("--once promises refusals: it can't go with --observe")

    def told(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, told)
    signal.signal(signal.SIGHUP, told)
    status = 0
    try:
        envoy = find_envoy()
        settings: dict[str, Any] = {"service": {"mode": "observe"}} if observe else {}
        if bundle is not None:
            settings["models"] = {"bundle": str(bundle.absolute())}
        stack = Stack(settings, keep=keep, plugin=plugin)
        inside = " with Outrider inside" if plugin else ""
        console.print(
            f"Starting the demo API, the sidecar and Envoy{inside} ({envoy}) ...", style="dim", markup=False
        )
        with stack:
            status = tour(stack, console) if once else show(stack, console)
        if status:
            console.print(f"Logs and configurations: {stack.folder}", markup=False)
    except (DemoError, PluginError) as error:
        console.print(f"outrider demo: {error}", markup=False, style="red", highlight=False)
        status = 3
    except KeyboardInterrupt:
        status = 0 if not once else 130
    sys.exit(status)


def tour(stack: Any, console: Any) -> int:
    from sidecar.demo.tour import Tour

    run = Tour(stack)
    kept = run.run()
    run.report(console)
    stack.keep = stack.keep or not kept
    return 0 if kept else 1


def show(stack: Any, console: Any) -> int:
    """Print addresses and lines to try, then decisions until Ctrl-C or until a child ends."""
    from rich.text import Text

    from sidecar.demo.show import Tail, line

    console.print(
        Text(
            GUIDE.format(
                url=stack.url, admin=stack.admin_url, envoy=stack.envoy_admin_url, folder=stack.folder
            )
        )
    )
    tail = Tail(Path(stack.decisions))
    try:
        while True:
            for record in tail.new():
                console.print(line(record))
            dead = stack.dead()
            if dead is not None:
                console.print(Text(f"{dead.name} ended. Its log, {dead.log}, ends:\n{dead.tail()}", "red"))
                stack.keep = True
                return 1
            time.sleep(0.1)
    except KeyboardInterrupt:
        console.print(Text("\nStopping."))
        return 0


GUIDE = """
  the API, guarded       {url}
  Outrider's metrics     {admin}/metrics
  Envoy's administration {envoy}
  logs, configurations   {folder}

Try:
  curl -i '{url}/search?q=oak+chair'
  curl -i '{url}/search?q=%27+UNION+SELECT+password+FROM+users--'
  curl -i '{url}/files?name=../../../../etc/passwd'
  curl -i -H 'content-type: application/json' -d '{{"user":"ada","password":"lovelace-1815"}}' {url}/login
  curl -s '{url}/echo'                       (what the service sees)
  for i in $(seq 30); do curl -so /dev/null -w '%{{http_code}} ' -d 'user=ada&password='$i {url}/login; done

Decisions as they happen (Ctrl-C ends everything):
"""
