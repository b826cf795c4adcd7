"""The `outrider` command. Each subcommand lives in a module of sidecar.commands and is
imported only when asked for, so that `outrider version` doesn't load scikit-learn."""
from __future__ import annotations

import importlib

import click

# name -> (module in sidecar.commands, one-line help shown by `outrider --help`)
COMMANDS: dict[str, tuple[str, str]] = {
    "bench": ("bench", "Load benchmarks: Envoy bare, with an empty server, with Outrider."),
    "build-plugin": ("build_plugin", "Build the module that puts Outrider inside Envoy or NGINX."),
    "bundle": ("bundle", "Inspect, verify or compile a model bundle."),
    "check": ("check", "Check a configuration file and say everything that is wrong with it."),
    "completion": ("completion", "Print the shell completion script."),
    "demo": ("demo", "A tour: demo API, Envoy and the sidecar, with traffic through them."),
    "judge": ("judge", "The judge: serve it, see and undo its verdicts, make and measure models."),
    "latency": ("latency", "Show how long decisions take on each route, and whether budgets hold."),
    "replay": ("replay", "Replay logs through time, per client, and say who would have been refused."),
    "schema": ("schema", "Print the JSON Schema of the configuration, for editors."),
    "score": ("score", "Score request records one by one and write decision records."),
    "serve": ("serve", "Serve decisions to Envoy and NGINX, and keep the arena of their plugins."),
    "simulate": ("simulate", "Generate traffic of normal users and of attackers, with labels."),
    "train": ("train", "Train, calibrate and compile a model bundle from logs."),
    "version": ("version", "Print versions and what this machine can do."),
}


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"sidecar.commands.{COMMANDS[name][0]}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # the table above, without importing a single command
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in sorted(COMMANDS)])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Outrider: an API-security sidecar with a latency budget.

    \b
    outrider demo --once              see it work
    outrider serve -c outrider.yaml   serve decisions to Envoy
    outrider replay access.log        what would it have done?
    """


if __name__ == "__main__":
    main()
