"""A judge's folder: a CTranslate2 model, its tokenizer, and judge.json, which says how it is to be asked.

    model.bin, config.json, vocabulary.json   CTranslate2
    tokenizer.json                            tokenizers
    judge.json                                prompt, labels, calibration, thresholds, hashes of the other files

judge.json is written last and the folder is put in place by rename: one that was cut off in the middle has no
judge.json, or hashes that don't match, and is refused. The hash of judge.json names the model everywhere, since it
covers the other files' hashes. A folder is trusted like code: model.bin is read by a C++ library.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sidecar.judge.types import LABELS

FORMAT = 1
MANIFEST = "judge.json"
TOKENIZER = "tokenizer.json"
VOCABULARY = "vocabulary.json"
NEEDED = ("model.bin", "config.json", VOCABULARY, TOKENIZER)
# CTranslate2 would read these by itself, so none may lie there unmentioned
READ_BY_NAME = (*NEEDED, "vocabulary.txt", "shared_vocabulary.json", "shared_vocabulary.txt")

MANIFEST_BYTES_MAX = 1 << 20
TEXT_FILE_BYTES_MAX = 64 << 20  # tokenizer, vocabulary
MODEL_BYTES_MAX = 256 << 30
FILES_MAX = 16
TOKENS_MAX = 8192
CONTROLS_MAX = 64


class ModelError(ValueError):
    """A judge's folder or a device that can't be used; says what is wrong, where, and what to do."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, extra="allow")


Token = Annotated[str, Field(min_length=1, max_length=256)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class Text(_Part):
    """A piece of a prompt that is tokenised as text, unlike a plain string, which is one control token."""

    text: Annotated[str, Field(max_length=16384)]


class Calibration(_Part):
    """softmax(log(share) / temperature + bias) over the labels' shares."""

    temperature: Annotated[float, Field(ge=0.02, le=50.0)] = 1.0
    bias: dict[str, Annotated[float, Field(ge=-50.0, le=50.0)]] = {}


class Padding(_Part):
    """Prompts are filled up to multiples of so many tokens with this one, before the suffix: only prompts of equal
    length share a batch."""

    token: Token
    multiple: Annotated[int, Field(ge=2, le=256)]


class Manifest(_Part):
    """judge.json. What isn't listed here (training, metrics) is kept and not interpreted."""

    format: Literal[1]
    kind: Literal["embedded", "instruct"]
    name: Annotated[str, Field(max_length=120)] = ""
    prefix: Annotated[list[Token | Text], Field(max_length=CONTROLS_MAX)]
    suffix: Annotated[list[Token | Text], Field(min_length=1, max_length=CONTROLS_MAX)]
    labels: dict[str, Token]
    max_tokens: Annotated[int, Field(ge=16, le=TOKENS_MAX)]  # of a whole prompt
    min_mass: Share = 0.5
    padding: Padding | None = None
    entry_chars: Annotated[int, Field(ge=320, le=65536)] = 640  # how entries are to be rendered for it
    windows_max: Annotated[int, Field(ge=3, le=64)] = 12
    calibration: Calibration = Calibration()
    thresholds: dict[str, dict[str, Share]] = {}  # {"malicious": {false-positive rate: threshold}}
    files: Annotated[dict[FileName, Digest], Field(max_length=FILES_MAX)]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if set(self.labels) != set(LABELS):
            raise ValueError(f"labels must be exactly {', '.join(LABELS)}")
        if len(set(self.labels.values())) != len(self.labels):
            raise ValueError("two labels have the same token")
        if unknown := set(self.calibration.bias) - set(LABELS):
            raise ValueError(f"calibration.bias names {sorted(unknown)[0]!r}, which is no label")
        if missing := [name for name in NEEDED if name not in self.files]:
            raise ValueError(f"files doesn't list {missing[0]}")
        return self


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """(judge.json, its hash); nothing else is looked at. Raises ModelError."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; make one with `outrider judge train` or `outrider judge convert`")
    path = folder / MANIFEST
    try:
        with path.open("rb") as file:
            data = file.read(MANIFEST_BYTES_MAX + 1)
    except FileNotFoundError:
        raise ModelError(
            f"{folder}: has no {MANIFEST}: not a judge's folder, or one that was half written; make it again"
        ) from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MANIFEST_BYTES_MAX:
        raise ModelError(f"{path}: more than {MANIFEST_BYTES_MAX} bytes")
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "as a whole"
        raise ModelError(f"{path}: {where}: {first['msg']}; make the folder again with this version") from None
    return manifest, hashlib.sha256(data).hexdigest()


def check_files(folder: Path, manifest: Manifest) -> None:
    """Hashes every file (a second or so per GB). Raises ModelError."""
    for name in READ_BY_NAME:
        if name not in manifest.files and (folder / name).exists():
            raise ModelError(f"{folder / name}: {MANIFEST} doesn't list it; remove it or make the folder again")
    for name, wanted in manifest.files.items():
        path = folder / name
        most = MODEL_BYTES_MAX if name == "model.bin" else TEXT_FILE_BYTES_MAX
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > most:
                raise ModelError(f"{path}: not a file of at most {most} bytes")
            found = digest(path)
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror}); copy the folder again") from None
        if found != wanted:
            raise ModelError(
                f"{path}: is not the file that {MANIFEST} describes (hash {found[:12]}, not {wanted[:12]}); "
                "the folder is half written or mixed: copy or make it again"
            )


def write_manifest(folder: Path, fields: Mapping[str, Any]) -> Manifest:
    """Hashes what lies in the folder and writes judge.json, last. Raises ModelError."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    made = {"format": FORMAT, **fields, "files": {name: digest(folder / name) for name in names}}
    text = json.dumps(made, indent=1, ensure_ascii=False) + "\n"
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise ModelError(f"{folder}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    path = folder / MANIFEST
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return manifest


@contextmanager
def replaced(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that takes its place once the block ends well, and is removed if it doesn't.

    What lies at `out` is replaced only if it is a judge's folder (or empty). Raises ModelError."""
    if out.exists() and not (out / MANIFEST).exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ModelError(f"{out}: is there and isn't a judge's folder; name another or remove it")
    mark = secrets.token_hex(4)
    fresh, old = out.with_name(f".{out.name}.{mark}.new"), out.with_name(f".{out.name}.{mark}.old")
    try:
        fresh.mkdir(parents=True)
    except OSError as error:
        raise ModelError(f"{fresh}: cannot be made: {error.strerror}") from None
    try:
        yield fresh
        with suppress(FileNotFoundError):
            out.rename(old)
        try:
            fresh.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
