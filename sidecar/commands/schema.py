"""outrider schema: the JSON Schema of the configuration."""

from __future__ import annotations

import json

import click

from sidecar.config.schema import schema


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--compact", is_flag=True, help="On one line.")
def command(compact: bool) -> None:
    """Print the JSON Schema of the configuration file, for editors and pipelines.

    \b
    outrider schema > outrider.schema.json
    \b
    Then, as the first line of the configuration, for editors with yaml-language-server:
    # yaml-language-server: $schema=outrider.schema.json
    """
    data = schema()
    click.echo(json.dumps(data, separators=(",", ":")) if compact else json.dumps(data, indent=2))
