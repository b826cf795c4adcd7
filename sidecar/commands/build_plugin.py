"""outrider build-plugin: the modules for Envoy and NGINX."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from sidecar.plugins import NAMES, PluginError, build

NEXT = {
    "envoy": (
        "ENVOY_DYNAMIC_MODULES_SEARCH_PATH={folder} envoy -c envoy-plugin.yaml",
        "see envoy/envoy-plugin.yaml for the filter",
    ),
    "nginx": ("load_module {path};", "see envoy/nginx.conf for the directives"),
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("proxy", type=click.Choice(sorted(NAMES)))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    metavar="DIR",
    help="Put the module there; without, it stays in the cache and its path is printed.",
)
@click.option("--sanitize", is_flag=True, help="With AddressSanitizer and UBSan, for tests; preload their runtimes.")
def command(proxy: str, out: Path | None, sanitize: bool) -> None:
    """Build the module that puts Outrider inside PROXY: envoy (a dynamic module, 1.38 to 1.40) or nginx (a dynamic
    module for the installed NGINX; needs its headers, Debian: nginx-dev).

    \b
    outrider build-plugin envoy --out /usr/lib/outrider
    outrider build-plugin nginx --out /usr/lib/nginx/modules

    The module holds the whole data plane and no Python. It decides on requests by the arena that `outrider serve`
    makes: build it with the same version of Outrider, or it will refuse the arena and follow its failure mode.

    Exit status: 0 built; 3 something that it needs isn't there, or failed.
    """
    try:
        path = build(proxy, out, sanitize)
    except PluginError as error:
        click.echo(f"outrider build-plugin: {error}", err=True)
        sys.exit(3)
    click.echo(path)
    for line in NEXT[proxy]:
        click.echo("  " + line.format(path=path.absolute(), folder=path.absolute().parent), err=True)
