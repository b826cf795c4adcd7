"""outrider serve"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-c",
    "--config",
    "path",
    type=click.Path(path_type=Path),
    required=True,
    help="The configuration file (YAML).",
)
def command(path: Path) -> None:
    """Serve decisions: to Envoy (ext_proc), to NGINX (auth_request), and to plugins in proxies by the arena.

    Runs until SIGTERM or Ctrl-C: then it says "not ready", lets requests in progress finish
    (listen.drain) and ends. SIGHUP reads the configuration again and reopens the decision log; a
    configuration with a mistake is refused and the running one kept.

    \b
    outrider serve -c outrider.yaml
    curl 127.0.0.1:9902/metrics          what it counted
    kill -HUP <pid>                      read the configuration again

    Exit status: 0 stopped as told; 2 wrong configuration; 3 an address, file or memory isn't to be
    had; 4 the model bundle is refused; 5 somebody cut the arena's file short while it was in use
    (start again: a new one is made).
    """
    from sidecar.serve import logs
    from sidecar.serve.app import Application, read_settings
    from sidecar.serve.errors import StartupError

    try:
        settings = read_settings(path)
        logs.set_up(settings.log.level, settings.log.format)

        async def live() -> int:
            return await Application(path, settings).run()

        status = asyncio.run(live())
    except StartupError as error:
        click.echo(f"outrider serve: {error}", err=True)
        status = error.status
    sys.exit(status)
