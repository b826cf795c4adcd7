"""outrider completion: what a shell needs to complete Outrider's commands and options."""

from __future__ import annotations

import os
import sys

import click
from click.shell_completion import BashComplete, ShellComplete, get_completion_class

SHELLS = ("bash", "zsh", "fish")


class _Bash(BashComplete):
    """Click asks the bash on this machine for its version; the script may be meant for another one."""

    @staticmethod
    def _check_version() -> None:
        return


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("shell", type=click.Choice(SHELLS), required=False)
def command(shell: str | None) -> None:
    """Print the completion script of SHELL (default: the one you use).

    \b
    source <(outrider completion bash)                                     in ~/.bashrc
    source <(outrider completion zsh)                                      in ~/.zshrc
    outrider completion fish > ~/.config/fish/completions/outrider.fish
    """
    if shell is None:
        shell = os.path.basename(os.environ.get("SHELL", ""))
        if shell not in SHELLS:
            raise click.UsageError(f"which shell? Name one: {', '.join(SHELLS)}")
    found: type[ShellComplete] | None = _Bash if shell == "bash" else get_completion_class(shell)
    if found is None:
        click.echo(f"click has no completion for {shell}", err=True)
        sys.exit(1)
    root = click.get_current_context().find_root().command
    click.echo(found(root, {}, "outrider", "_OUTRIDER_COMPLETE").source())
