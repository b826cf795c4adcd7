"""Judging: what a CTranslate2 model says of entries, as one label out of LABELS.

Nothing is generated. A prompt ends where the answer would begin; one forward gives the logits of the next token, and
the labels' tokens among them are compared. Their share of the whole vocabulary's probability says whether the model
answers the question at all: below min_mass it abstains. Needs ctranslate2, tokenizers and numpy, no torch.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from sidecar.judge.folder import Manifest, ModelError, check_files, read_manifest
from sidecar.judge.prompts import Prompter
from sidecar.judge.types import LABELS, Judgement, Label

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]

ENTRIES_MAX = 64  # of one escalation
ITEMS_MAX = 4096  # of one call
BATCH_MAX = 1024
# a beginning shorter than this isn't worth keeping: looking up its state costs as much as computing it
STATIC_TOKENS_MIN = 8
SHARE_MIN = 1e-12
BEST_TYPES = {
    "cuda": ("int8_float16", "int8_bfloat16", "float16", "float32"),
    "cpu": ("int8", "int8_float32", "float32"),
}
BATCH_DEFAULT = {"cuda": 64, "cpu": 16}


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one escalation. label None: it abstains, or error says why there is none. probabilities: calibrated, by label,
    in the worst window. windows: how many were judged; left_out: tokens that none of them showed."""

    label: Label | None
    confidence: float
    probabilities: dict[str, float]
    mass: float
    windows: int
    left_out: int = 0
    error: str = ""

    def judgement(self, escalation: str, model: str, took_ms: float) -> Judgement:
        return Judgement(
            escalation, self.label, self.confidence, self.probabilities, self.mass, self.windows, model, took_ms
        )


@dataclass(slots=True)
class Counts:
    """Since the model was opened."""

    items: int = 0
    windows: int = 0
    tokens: int = 0  # without the constant beginning
    batches: int = 0
    abstained: int = 0
    failed: int = 0
    out_of_memory: int = 0  # batches that were halved or given up
    left_out: int = 0  # items of which not all was shown


class JudgeModel:
    """Made by open(). judge() may be called from several threads."""

    def __init__(
        self, folder: Path, manifest: Manifest, digest: str, prompter: Prompter, batch_max: int | None = None
    ) -> None:
        self.folder, self.manifest, self.hash = folder, manifest, digest
        self.device: Literal["cpu", "cuda"] = "cpu"
        self.compute_type = ""
        self.fell_back = ""  # why `auto` took the CPU though there is, or should be, a GPU
        self.counts = Counts()
        self._prompter = prompter
        self._batch_max = batch_max
        self._library = importlib.import_module("ctranslate2")
        self._generator: Any = None
        self._lock = threading.Lock()
        self._static = prompter.prefix if len(prompter.prefix) >= STATIC_TOKENS_MIN else None
        self._before = [] if self._static else prompter.prefix
        self._labels = np.array(prompter.label_numbers)
        self._bias = np.array([manifest.calibration.bias.get(label, 0.0) for label in LABELS])

    @classmethod
    def open(
        cls,
        folder: Path,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        compute_type: str = "auto",
        device_index: Sequence[int] = (0,),
        inter_threads: int = 1,
        intra_threads: int = 1,
        batch_max: int | None = None,
    ) -> Self:
        """Checks the folder, loads the model and asks it once. inter_threads: batches at a time (per GPU);
        intra_threads: of one batch, CPU only; batch_max: default 64 on a GPU, 16 on a CPU.

        device auto: a GPU if one works, else the CPU, and the log says which and why. Raises ModelError."""
        folder = Path(folder)
        if batch_max is not None and not 1 <= batch_max <= BATCH_MAX:
            raise ModelError(f"batch_max {batch_max}: must be 1 to {BATCH_MAX}")
        try:
            library = importlib.import_module("ctranslate2")
            importlib.import_module("tokenizers")
        except ImportError as error:
            raise ModelError(f"{error.name} is missing: judging needs it; pip install 'outrider[judge]'") from None
        manifest, digest = read_manifest(folder)
        check_files(folder, manifest)
        model = cls(folder, manifest, digest, Prompter(folder, manifest), batch_max)
        threads = {"inter_threads": inter_threads, "intra_threads": intra_threads}
        if device != "cpu":
            found = int(library.get_cuda_device_count())
            try:
                if not found:
                    raise ModelError("CTranslate2 finds no GPU; is its driver loaded?")
                if wrong := [index for index in device_index if not 0 <= index < found]:
                    raise ModelError(f"device_index {wrong[0]}: there are {found} GPUs, numbered from 0")
                model._load("cuda", compute_type, device_index, threads)
            except ModelError as error:
                if device == "cuda":
                    raise ModelError(f"{folder}: device cuda: {error}") from None
                model.fell_back = str(error)
        if model._generator is None:
            if model.fell_back and compute_type not in (*BEST_TYPES["cpu"], "auto", "int16"):
                model.fell_back += f"; compute_type {compute_type} is for GPUs, auto was taken"
                compute_type = "auto"
            model._load("cpu", compute_type, (0,), threads)
        log.log(
            logging.WARNING if model.fell_back else logging.INFO,
            "judge %s (%s): device %s, compute type %s, %d devices%s",
            manifest.name or folder.name,
            digest[:12],
            model.device,
            model.compute_type,
            len(device_index) if model.device == "cuda" else 1,
            f"; on the CPU because: {model.fell_back}" if model.fell_back else "",
        )
        return model

    def _load(self, device: Literal["cpu", "cuda"], wanted: str, index: Sequence[int], threads: dict[str, int]) -> None:
        try:
            supported = self._library.get_supported_compute_types(device)
            if wanted == "auto":
                compute = next((name for name in BEST_TYPES[device] if name in supported), "default")
            elif wanted == "default" or wanted in supported:
                compute = wanted
            else:
                known = ", ".join(sorted(supported))
                raise ModelError(f"compute_type {wanted} isn't supported on {device}: {known} are")
            self._generator = self._library.Generator(
                str(self.folder),
                device=device,
                device_index=list(index),
                compute_type=compute,
                max_queued_batches=-1,  # else submitting blocks; what may wait is bounded by ITEMS_MAX
                **threads,
            )
            self.device, self.compute_type = device, str(self._generator.compute_type)
            self._probe()
        except (RuntimeError, ValueError) as error:
            self._generator = None
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{self.folder}: cannot be loaded on {device}: {str(error)[:300]}") from None

    def _probe(self) -> None:
        """One prompt, for what only shows in use: a vocabulary of another size, a GPU without its libraries, NaN."""
        logits = self._read(self._submit(self._with_prefix(self._prompter.cut("GET /\n").prompts))[0])
        if len(logits) != len(self._prompter.vocabulary):
            raise ModelError(
                f"{self.folder}: the model has {len(logits)} outputs and its vocabulary "
                f"{len(self._prompter.vocabulary)} tokens: they don't belong together; convert the model again"
            )
        if not np.isfinite(logits).all():
            raise ModelError(f"{self.folder}: the model's outputs aren't numbers with compute type {self.compute_type}")

    def close(self) -> None:
        """Frees the model's memory; judge() must not be running."""
        if self._generator is not None:
            self._generator.unload_model()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------- judging

    def judge(self, prompts: Sequence[Sequence[str]]) -> list[Answer]:
        """One answer per escalation, each given as its entries (see render.py); the window with the least P(benign)
        decides, of those in which the labels have mass enough.

        An item that can't be judged gets an Answer with an error; the others are judged. Raises ValueError for more
        than ITEMS_MAX escalations."""
        if len(prompts) > ITEMS_MAX:
            raise ValueError(f"{len(prompts)} escalations at once: at most {ITEMS_MAX} are taken")
        errors: dict[int, str] = {}
        left_out = [0] * len(prompts)
        owner: list[int] = []
        windows: list[list[str]] = []
        for item, entries in enumerate(prompts):
            if not 1 <= len(entries) <= ENTRIES_MAX:
                errors[item] = f"{len(entries)} entries: an escalation has 1 to {ENTRIES_MAX}"
                continue
            try:
                cuts = [self._prompter.cut(entry) for entry in entries]
            except ValueError as error:
                errors[item] = str(error)
                continue
            left_out[item] = sum(cut.left_out for cut in cuts)
            made = self._with_prefix([prompt for cut in cuts for prompt in cut.prompts])
            windows += made
            owner += [item] * len(made)
        shares, mass, failed = self._ask(windows)
        for number, error_text in failed.items():
            errors[owner[number]] = error_text
        rows: dict[int, list[int]] = defaultdict(list)
        for number, item in enumerate(owner):
            rows[item].append(number)
        answers = [
            Answer(None, 0.0, {}, 0.0, len(rows[item]), left_out[item], errors[item])
            if item in errors
            else self._answer(shares[rows[item]], mass[rows[item]], left_out[item])
            for item in range(len(prompts))
        ]
        with self._lock:
            self.counts.items += len(prompts)
            self.counts.failed += len(errors)
            self.counts.abstained += sum(1 for answer in answers if answer.label is None and not answer.error)
            self.counts.left_out += sum(1 for tokens in left_out if tokens)
        return answers

    def _with_prefix(self, prompts: list[list[str]]) -> list[list[str]]:
        return [self._before + prompt for prompt in prompts] if self._before else prompts

    def _answer(self, shares: Floats, mass: Floats, left_out: int) -> Answer:
        sound = mass >= self.manifest.min_mass
        # a window at which the model doesn't answer must not silence the others
        candidates = np.flatnonzero(sound) if sound.any() else np.arange(len(mass))
        worst = int(candidates[shares[candidates, 0].argmin()])
        scaled = np.log(np.maximum(shares[worst], SHARE_MIN)) / self.manifest.calibration.temperature + self._bias
        sure = np.exp(scaled - scaled.max())
        sure /= sure.sum()
        best = int(sure.argmax())
        label = LABELS[best] if sound[worst] else None
        return Answer(
            label,
            float(sure[best]),
            {name: float(p) for name, p in zip(LABELS, sure, strict=True)},
            float(mass[worst]),
            len(mass),
            left_out,
        )

    def _ask(self, windows: list[list[str]]) -> tuple[Floats, Floats, dict[int, str]]:
        """(labels' shares among themselves, their mass, error by window). All batches are submitted before the first
        is waited for, so that several workers or devices have something to do."""
        shares = np.zeros((len(windows), len(LABELS)))
        mass = np.zeros(len(windows))
        errors: dict[int, str] = {}
        lengths: dict[int, list[int]] = defaultdict(list)
        for number, window in enumerate(windows):
            lengths[len(window)].append(number)  # others would be read token by token beyond the shortest
        size = self._batch_max or BATCH_DEFAULT[self.device]
        parts = [group[at : at + size] for group in lengths.values() for at in range(0, len(group), size)]
        waiting = [(part, self._submit([windows[number] for number in part])) for part in parts]
        while waiting:
            part, futures = waiting.pop(0)
            try:
                for number, future in zip(part, futures, strict=True):
                    shares[number], mass[number] = self._shares(self._read(future))
            except RuntimeError as error:
                if "memory" not in str(error).lower():
                    errors.update(dict.fromkeys(part, f"the model failed: {str(error)[:200]}"))
                    continue
                with self._lock:
                    self.counts.out_of_memory += 1
                if len(part) == 1:
                    log.warning("out of memory on %s for one window of %d tokens", self.device, len(windows[part[0]]))
                    errors[part[0]] = f"out of memory on {self.device} for one window; lower max_tokens or free memory"
                    continue
                half = (len(part) + 1) // 2
                log.warning("out of memory on %s for a batch of %d: halved", self.device, len(part))
                # only once the others are done: they hold memory
                waiting += [(some, self._submit([windows[k] for k in some])) for some in (part[:half], part[half:])]
        with self._lock:
            self.counts.windows += len(windows)
            self.counts.tokens += sum(map(len, windows))
            self.counts.batches += len(parts)
        return shares, mass, errors

    def _submit(self, prompts: list[list[str]]) -> list[Any]:
        """Futures, in order. The constant beginning is the only static prompt ever given: their store is unbounded."""
        futures: list[Any] = self._generator.generate_batch(
            prompts,
            asynchronous=True,
            max_length=1,
            include_prompt_in_result=False,
            return_logits_vocab=True,
            static_prompt=self._static,
        )
        return futures

    def _read(self, future: Any) -> NDArray[np.float32]:
        view = future.result().logits[0][-1]
        view = view.to(self._library.DataType.float32).to_device(self._library.Device.cpu)
        return np.array(view, dtype=np.float32).reshape(-1)

    def _shares(self, logits: NDArray[np.float32]) -> tuple[Floats, float]:
        top = float(logits.max())
        if not np.isfinite(top):
            raise RuntimeError("its outputs aren't numbers")
        labels = np.exp(logits[self._labels].astype(np.float64) - top)
        total = float(np.exp(logits - top).sum(dtype=np.float64))
        among = max(float(labels.sum()), np.finfo(np.float64).tiny)
        return labels / among, float(labels.sum()) / total
