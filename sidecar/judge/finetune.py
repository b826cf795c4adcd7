"""Fine-tuning an instruct Llama on labelled entries: LoRA adapters, merged into the weights, then converted.

What is learned is one token: the label's letter after the very prompt that serving uses, so that nothing differs
between training and judging. Needs torch, transformers and peft, which serving doesn't.
"""

from __future__ import annotations

import importlib
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sidecar.judge.convert import convert, read_config
from sidecar.judge.folder import Manifest, ModelError, read_manifest
from sidecar.judge.model import ITEMS_MAX, SHARE_MIN, JudgeModel
from sidecar.judge.prompts import Prompter
from sidecar.judge.train import threshold_at
from sidecar.judge.types import LABELS

RECORDS_MAX = 1_000_000
HELD_BACK_MIN = 8  # records; with fewer nothing is calibrated
FALSE_POSITIVE_RATES = (0.01, 0.001)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Labelled = tuple[Sequence[str], str]  # an escalation's entries, its label
Tell = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Settings:
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    learning_rate: float = 2e-4
    epochs: float = 1.0
    batch: int = 16  # windows a step
    minutes_max: float = 240.0
    held_back: float = 0.1  # of the records, for calibration and thresholds
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {"rank": (1, 256), "alpha": (1, 1024), "dropout": (0.0, 0.9), "learning_rate": (1e-7, 1.0)}
        bounds |= {"epochs": (0.01, 100.0), "batch": (1, 1024), "minutes_max": (0.01, 10_000.0)}
        bounds["held_back"] = (0.0, 0.5)
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise ModelError(f"{name} {getattr(self, name)}: must be {low:g} to {high:g}")


def finetune(
    source: Path,
    records: Iterable[Labelled],
    out: Path,
    *,
    settings: Settings | None = None,
    quantization: str = "int8",
    device: str = "auto",
    tell: Tell = lambda stage, share: None,
) -> Manifest:
    """Trains on `records`, merges, converts and calibrates; `out` is replaced once the new folder is whole.

    source: a transformers folder of a Llama-3.x-Instruct, which isn't changed. device: auto, cpu, cuda. Raises
    ModelError."""
    settings = settings or Settings()
    try:
        torch = importlib.import_module("torch")
        transformers = importlib.import_module("transformers")
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ModelError(f"{error.name} is missing: fine-tuning needs it; pip install 'outrider[train]'") from None
    read_config(source)
    learned, held = split(records, settings)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(settings.seed)
    with tempfile.TemporaryDirectory(prefix="outrider-finetune-", dir=out.parent) as scratch:
        tell("preparing", 0.0)
        plain = Path(scratch) / "plain"
        convert(source, plain, "int8")  # for its prompts: the very ones that will be served
        manifest, _ = read_manifest(plain)
        prompter = Prompter(plain, manifest)
        rows = rows_of(learned, prompter)
        try:
            dtype = torch.bfloat16 if device == "cuda" else torch.float32
            model = transformers.LlamaForCausalLM.from_pretrained(source, dtype=dtype).to(device)
            adapters = peft.LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,
                lora_dropout=settings.dropout,
                target_modules=list(TARGETS),
                task_type="CAUSAL_LM",
            )
            model = peft.get_peft_model(model, adapters)
            fitted = fit(torch, model, rows, prompter.label_numbers, settings, device, tell)
            tell("merging", 0.0)
            merged = Path(scratch) / "merged"
            model.merge_and_unload().save_pretrained(merged)
        except (RuntimeError, OSError, ValueError) as error:
            hint = "; a smaller batch needs less memory" if "memory" in str(error) else ""
            raise ModelError(f"{source}: cannot be fine-tuned: {str(error)[:300]}{hint}") from None
        del model
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (source / name).is_file():
                (merged / name).write_bytes((source / name).read_bytes())
        training = {**asdict(settings), **fitted, "records": dict(Counter(label for _, label in learned))}
        fields = {"name": f"{source.resolve().name}-tuned", "training": training}
        tell("converting", 0.0)
        fresh = Path(scratch) / "judge"
        manifest = convert(merged, fresh, quantization, fields=fields)
        if len(held) >= HELD_BACK_MIN:
            tell("calibrating", 0.0)
            fields |= calibrate(fresh, held)
        manifest = convert(merged, out, quantization, fields=fields)
    return manifest


def split(records: Iterable[Labelled], settings: Settings) -> tuple[list[Labelled], list[Labelled]]:
    """(to learn from, held back), drawn by the seed. Raises ModelError."""
    found: list[Labelled] = []
    for number, (entries, label) in enumerate(records):
        if number >= RECORDS_MAX:
            raise ModelError(f"more than {RECORDS_MAX} records: give fewer")
        if label not in LABELS:
            raise ModelError(f"record {number + 1}: label {str(label)[:40]!r} is none of {', '.join(LABELS)}")
        if not entries:
            raise ModelError(f"record {number + 1}: has no text")
        found.append((list(entries), label))
    if len({label for _, label in found}) < 2:
        raise ModelError(f"{len(found)} records of fewer than 2 labels: there is nothing to tell apart; give more")
    random.Random(f"{settings.seed}:split").shuffle(found)
    held = int(len(found) * settings.held_back)
    if held < HELD_BACK_MIN:
        held = 0
    if len({label for _, label in found[held:]}) < 2:
        raise ModelError("too few records: after holding some back for calibration only one label is left")
    return found[held:], found[:held]


def rows_of(records: Sequence[Labelled], prompter: Prompter) -> list[tuple[list[int], int]]:
    """(a whole prompt's token numbers, the label's number in LABELS) per window. Raises ModelError."""
    numbers = {token: number for number, token in enumerate(prompter.vocabulary)}
    before = [numbers[token] for token in prompter.prefix]
    rows = []
    for number, (entries, label) in enumerate(records):
        try:
            cuts = [prompter.cut(entry) for entry in entries]
        except ValueError as error:
            raise ModelError(f"record {number + 1}: {error}") from None
        for prompt in (prompt for cut in cuts for prompt in cut.prompts):
            rows.append(([*before, *(numbers[token] for token in prompt)], LABELS.index(label)))
    return rows


def fit(
    torch: Any,
    model: Any,
    rows: list[tuple[list[int], int]],
    label_numbers: Sequence[int],
    settings: Settings,
    device: str,
    tell: Tell,
) -> dict[str, Any]:
    """AdamW, warm-up and cosine, over settings.epochs or minutes_max. The loss is over the whole vocabulary, so that
    the labels' mass is learned too."""
    rng = random.Random(f"{settings.seed}:fit")
    targets = torch.tensor(list(label_numbers), device=device)
    counts = Counter(label for _, label in rows)
    mean = len(rows) / sum(n**0.5 for n in counts.values())
    weights = torch.tensor([mean / counts[k] ** 0.5 if counts[k] else 0.0 for k in range(len(LABELS))], device=device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate)
    wanted = max(1, round(len(rows) * settings.epochs / settings.batch))
    started, loss_mean, steps = time.monotonic(), 0.0, 0
    todo: list[list[int]] = []
    model.train()
    while steps < wanted:
        share = max(steps / wanted, (time.monotonic() - started) / 60.0 / settings.minutes_max)
        if share >= 1.0:
            break
        if not todo:
            todo = batches(rows, settings.batch, rng)
        part = todo.pop()
        rate = min(1.0, (share + 1.0 / wanted) / 0.05) * (0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate
        longest = max(len(rows[k][0]) for k in part)
        ids = torch.zeros((len(part), longest), dtype=torch.long)
        seen = torch.zeros_like(ids)
        for row, k in enumerate(part):  # filled up in front, so that all end together
            tokens = rows[k][0]
            ids[row, longest - len(tokens) :] = torch.tensor(tokens)
            seen[row, longest - len(tokens) :] = 1
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        logits = model(
            input_ids=ids.to(device),
            attention_mask=seen.to(device),
            position_ids=positions.to(device),
            logits_to_keep=1,
            use_cache=False,
        ).logits[:, -1]
        labels = torch.tensor([rows[k][1] for k in part], device=device)
        losses = torch.nn.functional.cross_entropy(logits.float(), targets[labels], reduction="none")
        loss = (losses * weights[labels]).mean()
        if not torch.isfinite(loss):
            raise ValueError("the loss is no number; lower the learning rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        steps += 1
        value = float(loss.detach())
        loss_mean = 0.95 * loss_mean + 0.05 * value if steps > 1 else value
        tell("training", share)
    model.eval()
    minutes = (time.monotonic() - started) / 60.0
    return {
        "windows": len(rows),
        "steps": steps,
        "steps_wanted": wanted,
        "minutes": round(minutes, 2),
        "loss": round(loss_mean, 4),
    }


def batches(rows: Sequence[tuple[list[int], int]], size: int, rng: random.Random) -> list[list[int]]:
    """Numbers of rows of about equal length, in random order."""
    order = sorted(range(len(rows)), key=lambda k: (len(rows[k][0]), rng.random()))
    parts = [order[at : at + size] for at in range(0, len(order), size)]
    rng.shuffle(parts)
    return parts


def calibrate(folder: Path, held: Sequence[Labelled]) -> dict[str, Any]:
    """A temperature by cross entropy, and thresholds on P(not benign) at stated shares of held-back benign records, as
    fields of judge.json. A rate that so few benign records can't show gets no threshold."""
    with JudgeModel.open(folder, device="cpu") as model:
        asked = [entries for entries, _ in held]
        answers = [a for at in range(0, len(asked), ITEMS_MAX) for a in model.judge(asked[at : at + ITEMS_MAX])]
    usable = [(answer, label) for answer, (_, label) in zip(answers, held, strict=True) if not answer.error]
    if not usable:
        raise ModelError(f"{folder}: none of {len(held)} records held back could be judged: {answers[0].error}")
    logs = np.log([[max(answer.probabilities[name], SHARE_MIN) for name in LABELS] for answer, _ in usable])
    labels = np.array([LABELS.index(label) for _, label in usable])

    def scaled(temperature: float) -> Any:
        z = logs / temperature
        z -= z.max(1, keepdims=True)
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    rows = np.arange(len(labels))
    temperature = min(np.geomspace(0.2, 10.0, 80), key=lambda t: float(-scaled(float(t))[rows, labels].mean()))
    p = np.exp(scaled(float(temperature)))
    benign = 1.0 - p[labels == 0, 0]
    thresholds = {
        f"{rate:g}": round(threshold_at(benign, rate), 6)
        for rate in FALSE_POSITIVE_RATES
        if len(benign) * rate >= 1.0
    }
    right = float((p.argmax(1) == labels).mean())
    abstained = sum(answer.label is None for answer, _ in usable)
    return {
        "calibration": {"temperature": round(float(temperature), 6), "bias": {}},
        "thresholds": {"malicious": thresholds},
        "metrics": {"held_back": len(usable), "same_label": round(right, 4), "abstained": abstained},
    }
