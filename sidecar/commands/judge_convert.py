"""`outrider judge convert`: a judge out of a Llama-3.x-Instruct model."""

from __future__ import annotations

from pathlib import Path

import click

FOLDER = click.Path(file_okay=False, path_type=Path)
QUANTIZATIONS = ("int8", "int8_float16", "int8_bfloat16", "float16", "bfloat16", "float32")


@click.command(short_help="Make a judge out of a Llama-3.x-Instruct model's folder.")
@click.argument("source", type=FOLDER)
@click.option("--out", required=True, type=FOLDER, metavar="FOLDER", help="The new judge's folder.")
@click.option("--quantization", default="int8", show_default=True, type=click.Choice(QUANTIZATIONS))
@click.option("--max-tokens", default=1536, show_default=True, type=click.IntRange(256, 8192), help="Of a prompt.")
def command(source: Path, out: Path, quantization: str, max_tokens: int) -> None:
    """SOURCE: the folder of a Llama-3.x-Instruct as transformers saves it. Its rotary scaling, which CTranslate2's own
    converter leaves out, is put in. Needs the `train` extra.

    The new judge isn't calibrated: set judge.verdicts.flag, or fine-tune it (outrider judge finetune).

    \b
    outrider judge convert ./Llama-3.2-1B-Instruct --out /var/lib/outrider/llama-1b
    """
    from sidecar.commands.judge import fail
    from sidecar.judge.convert import convert
    from sidecar.judge.folder import ModelError

    try:
        convert(source, out, quantization, max_tokens=max_tokens)
    except ModelError as error:
        fail(error)
    click.echo(f"{out}: made")
