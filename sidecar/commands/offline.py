"""What the commands that read files share: their options, the core, progress and errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from sidecar.records import FORMATS, Reader, RecordsError, RequestRecord

if TYPE_CHECKING:
    from sidecar.core import Core

F = TypeVar("F", bound=Callable[..., object])
Step = Callable[[Iterable[RequestRecord], int | None], Iterator[RequestRecord]]

INPUTS = (
    click.argument("files", nargs=-1, required=True, metavar="FILE..."),
    click.option(
        "--format",
        type=click.Choice(FORMATS),
        default="auto",
        show_default=True,
        help="Of the files; auto looks at the content of each.",
    ),
    click.option(
        "--strict", is_flag=True, help="Stop at the first line that can't be read instead of skipping it."
    ),
    click.option("-c", "--config", metavar="FILE", help="The configuration; without, the defaults."),
    click.option("--bundle", metavar="FOLDER", help="Model bundle instead of the configuration's."),
    click.option(
        "--models/--no-models",
        default=True,
        show_default=True,
        help="Without models only the detectors and lists decide.",
    ),
    click.option("--limit", type=click.IntRange(1), metavar="N", help="Stop after N requests."),
)


def inputs(command: F) -> F:
    """The arguments and options of a command that decides on files."""
    for option in reversed(INPUTS):
        command = option(command)
    return command


def core_for(config: str | None, bundle: str | None, models: bool) -> Core:
    """A private core; configuration and model errors end the command with their text."""
    from sidecar.bundle import BundleError
    from sidecar.config import ConfigError
    from sidecar.core import ArenaError, ModelError
    from sidecar.replay import open_offline

    try:
        return open_offline(config, bundle, models)
    except (ConfigError, BundleError, ArenaError, ModelError, OSError) as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def stop_on_error() -> Iterator[None]:
    """A file that can't be read or written is the user's to mend: a message, no traceback."""
    try:
        yield
    except RecordsError as error:
        raise click.ClickException(str(error)) from error
    except BrokenPipeError:
        raise SystemExit(141) from None


@contextmanager
def progress_to(console: Console, what: str) -> Iterator[Step]:
    """A counter on a terminal; gives a function that passes records through (at most so many) and counts."""
    progress = Progress(
        SpinnerColumn(),
        TextColumn(what),
        TextColumn("{task.fields[n]:,} requests"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
        task = progress.add_task("", total=None, n=0)

        def step(records: Iterable[RequestRecord], limit: int | None) -> Iterator[RequestRecord]:
            for n, record in enumerate(records if limit is None else islice(records, limit)):
                if n % 1000 == 0:
                    progress.update(task, n=n)
                yield record

        yield step


def tell_reader(console: Console, reader: Reader) -> None:
    """What of the files could not be read, if anything."""
    for message in reader.messages():
        console.print(Text(message, style="yellow"))
