"""Train the embedded judge: a small Llama that reads rendered entries and answers with one label token.

    outrider judge train --default-data ../shared/data --out ./judge

Needs torch and transformers, which serving doesn't. Everything is drawn from a seed; on the same machine and versions
the same seed gives the same model. Made are a byte-level BPE tokenizer, a Llama of about a million parameters, its
CTranslate2 int8 conversion, and judge.json, which says all that whoever serves it has to know.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidecar.judge.examples import Example, Maker, Score, Stories, entries, stories
from sidecar.judge.folder import MANIFEST, write_manifest
from sidecar.judge.render import ENTRY_CHARS, WINDOW_CHARS, WINDOWS_MAX
from sidecar.judge.types import LABELS
from sidecar.simulate import ATTACKS, Attack, Scenario
from sidecar.train.dataset import Dataset, load

ENTRY, VERDICT, PAD = "<|entry|>", "<|verdict|>", "<|pad|>"
CONTROL = (PAD, ENTRY, VERDICT, *(f"<|{label}|>" for label in LABELS))
FALSE_POSITIVE_RATES = (0.01, 0.001)
REMOTE = tuple(Attack(name, variant) for name, variants in ATTACKS.items() for variant in variants if name != "ddos")

Tell = Callable[[str, float], None]
Floats = NDArray[np.floating[Any]]

# what the judge that ships is trained from: permissive licences only. wcp_attack is kept to measure with
DEFAULT_SOURCES: dict[str, str] = {
    "wcp_benign.jsonl.gz": "MIT / Apache-2.0",
    "api_benign.jsonl.gz": "MIT / Apache-2.0",
    "benign_texts.jsonl.gz": "BSD-3-Clause (libinjection's part only)",
    "payloads.jsonl.gz": "BSD-3-Clause / MIT",
    "crs_regression.jsonl.gz": "Apache-2.0",
    "httpparams_train.csv.gz": "MIT",
    "user_agents.jsonl.gz": "MIT",
    "log_apache_2015.jsonl.gz": "Apache-2.0",
}
_LEFT_OUT_GROUPS = ("cqadupstack", "bright")  # of benign_texts: CC-BY and CC-BY-SA


class JudgeTrainingError(Exception):
    """Training isn't possible with these data or on this machine; says why and what to do."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the model and of its training. minutes_max: training is cut off then, and the
    manifest says so; the same seed gives the same model only where it wasn't."""

    vocabulary: int = 2048
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    inner: int = 344
    tokens_max: int = 512
    steps_rows: int = 57_000  # examples seen in all
    batch_tokens: int = 2048
    learning_rate: float = 2e-3
    minutes_max: float = 20.0
    attacks: int = 28_000
    benign: int = 18_000
    grammar_texts: int = 60_000
    disguise: float = 0.25


@dataclass(slots=True)
class Rows:
    """Tokenised entries with labels, and which example each belongs to."""

    tokens: list[list[int]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)


# ---------------------------------------------------------------- data


def read(paths: Sequence[Path], seed: int, grammar_texts: int) -> Dataset:
    """Raises JudgeTrainingError naming the file that can't be used."""
    missing = [str(p) for p in paths if not p.is_file()]
    if missing:
        raise JudgeTrainingError(f"no such file: {', '.join(missing)}")
    try:
        data = load(paths, seed, grammar_texts)
    except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
        raise JudgeTrainingError(
            f"cannot read the data: {error} (request records, payload lists or CSV as for train)"
        ) from error
    data.texts = [t for t in data.texts if not t.group.startswith(_LEFT_OUT_GROUPS)]
    return data


def scenarios(seed: int, count: int) -> list[Scenario]:
    return [Scenario(250, 4.0, seed * 100 + k, REMOTE, start_hour=(7 + 5 * k) % 20) for k in range(count)]


def examples_of(
    data: Dataset, told: Stories, split: Any, score: Score, shape: Shape, seed: int, disguise: float | None = None
) -> list[Example]:
    """A split's examples of all labels, shuffled."""
    maker = Maker(data, split, told, seed)
    disguise = shape.disguise if disguise is None else disguise
    out = maker.texts(1, shape.attacks, disguise)
    out += maker.texts(0, shape.benign // 2, disguise)
    out += maker.requests(score, shape.benign)
    out += told.examples
    maker.rng.shuffle(out)
    return out


# ---------------------------------------------------------------- tokenizer


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        show_progress=False,
        max_token_length=24,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in CONTROL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Encoder:
    """Entries to tokens, as whoever serves the model does it: what a client wrote never becomes a control token."""

    def __init__(self, tokenizer: Any, tokens_max: int) -> None:
        self.tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # isn't saved with it
        self.prefix = [tokenizer.token_to_id(ENTRY)]
        self.suffix = [tokenizer.token_to_id(VERDICT)]
        self.labels = [tokenizer.token_to_id(f"<|{label}|>") for label in LABELS]
        self.room = tokens_max - len(self.prefix) - len(self.suffix)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        found = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [[*self.prefix, *self._cut(e.ids), *self.suffix] for e in found]

    def _cut(self, ids: list[int]) -> list[int]:
        # an entry of nothing but rare bytes; its end holds the payload's
        return ids if len(ids) <= self.room else ids[: self.room // 3] + ids[len(ids) - (self.room - self.room // 3) :]


def rows_of(made: Sequence[Example], encoder: Encoder, seed: int) -> Rows:
    rng = random.Random(f"{seed}:rows")
    texts: list[str] = []
    out = Rows()
    for number, example in enumerate(made):
        shown = entries(example, rng)
        texts += shown
        out.labels += [LABELS.index(example.label)] * len(shown)
        out.owner += [number] * len(shown)
    out.tokens = encoder(texts)
    return out


# ---------------------------------------------------------------- the model


def build(shape: Shape, vocabulary: int, seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.tokens_max,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attention_bias=False,
    )
    return LlamaForCausalLM(config)


def batches(rows: Rows, tokens_max: int, rng: random.Random) -> list[list[int]]:
    """Numbers of rows, in batches of about equal length; the batches in random order."""
    order = sorted(range(len(rows.tokens)), key=lambda k: (len(rows.tokens[k]), rng.random()))
    out: list[list[int]] = []
    for k in order:
        # the last has the most tokens, and everything is filled up to it
        if out and (len(out[-1]) + 1) * len(rows.tokens[k]) <= tokens_max:
            out[-1].append(k)
        else:
            out.append([k])
    rng.shuffle(out)
    return out


def last_logits(model: Any, tokens: Sequence[Sequence[int]]) -> Any:
    """Logits after each row's last token. Rows are filled up at their end: with causal attention nothing sees that."""
    import torch

    longest = max(map(len, tokens))
    ids = torch.zeros((len(tokens), longest), dtype=torch.long)
    for k, row in enumerate(tokens):
        ids[k, : len(row)] = torch.tensor(row)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    at = torch.tensor([len(row) - 1 for row in tokens])
    return model.lm_head(hidden[torch.arange(len(tokens)), at])


def fit(model: Any, rows: Rows, encoder: Encoder, shape: Shape, seed: int, tell: Tell) -> dict[str, float]:
    """AdamW with a cosine schedule over shape.steps_rows examples; cut off after shape.minutes_max."""
    import torch

    rng = random.Random(f"{seed}:fit")
    counts = Counter(rows.labels)
    # rare classes count more, by the square root; the mean weight is 1
    weights = torch.tensor([1.0 / math.sqrt(counts[k]) if counts[k] else 0.0 for k in range(len(LABELS))])
    weights = weights / (sum(weights[k] * n for k, n in counts.items()) / len(rows.labels))
    targets = torch.tensor(encoder.labels)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=shape.learning_rate,
        betas=(0.9, 0.98),
    )
    started, seen, losses = time.monotonic(), 0, 0.0
    todo: list[list[int]] = []
    model.train()
    fast = torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
    share, cut_short = 0.0, False
    while share < 1.0:
        if not todo:
            todo = batches(rows, shape.batch_tokens, rng)
        batch = todo.pop()
        share = seen / shape.steps_rows
        if time.monotonic() - started > shape.minutes_max * 60.0:
            cut_short = True
            break
        rate = shape.learning_rate * (
            min(1.0, share / 0.03) if share < 0.03 else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        )
        for group in optimizer.param_groups:
            group["lr"] = max(rate, shape.learning_rate * 0.01)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast):
            logits = last_logits(model, [rows.tokens[k] for k in batch]).float()
        numbers = torch.tensor([rows.labels[k] for k in batch])
        loss = (
            torch.nn.functional.cross_entropy(logits, targets[numbers], reduction="none", label_smoothing=0.0)
            * weights[numbers]
        ).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += len(batch)
        losses = 0.98 * losses + 0.02 * float(loss.detach()) if losses else float(loss.detach())
        tell("training", share)
    model.eval()
    took = round((time.monotonic() - started) / 60.0, 2)
    return {"cut_short": cut_short, "rows": seen, "minutes": took, "loss": round(losses, 4)}


# ---------------------------------------------------------------- conversion


def convert(model: Any, tokenizer: Any, out: Path) -> None:
    """CTranslate2 int8 into out. The default RoPE (theta 10,000, no scaling) is what the converter gets right."""
    from ctranslate2.converters import TransformersConverter
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory(prefix="outrider-judge-") as scratch:
        model.save_pretrained(scratch)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=ENTRY, eos_token=VERDICT, unk_token=PAD, pad_token=PAD
        ).save_pretrained(scratch)
        TransformersConverter(scratch).convert(str(out), quantization="int8", force=True)
    tokenizer.save(str(out / "tokenizer.json"))


def torch_probabilities(model: Any, tokens: Sequence[Sequence[int]], encoder: Encoder) -> Floats:
    """(n, labels) and the labels' mass as the last column, in float32."""
    import torch

    out = np.zeros((len(tokens), len(LABELS) + 1))
    order = sorted(range(len(tokens)), key=lambda k: len(tokens[k]))
    with torch.inference_mode():
        for at in range(0, len(order), 32):
            part = order[at : at + 32]
            p = torch.softmax(last_logits(model, [tokens[k] for k in part]), -1)[:, encoder.labels].double().numpy()
            out[part, :-1] = p / p.sum(1, keepdims=True)
            out[part, -1] = p.sum(1)
    return out


# ---------------------------------------------------------------- judge.json


def fit_calibration(logs: Floats, labels: NDArray[np.integer[Any]]) -> tuple[float, list[float]]:
    """(temperature, bias per class) for softmax(log p / temperature + bias), by cross entropy; labels weigh equally in
    their two halves, benign and not."""
    import torch

    x = torch.tensor(logs, dtype=torch.float64)
    y = torch.tensor(labels)
    weight = torch.where(y == 0, 0.5 / max(1, int((y == 0).sum())), 0.5 / max(1, int((y != 0).sum()))).double()
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(logs.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scale, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimizer.zero_grad()
        z = x / torch.exp(scale) + bias
        loss = (torch.nn.functional.cross_entropy(z, y, reduction="none") * weight).sum() + 1e-3 * (bias**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(torch.exp(scale.detach())), [round(float(b), 6) for b in bias.detach()]


def calibrated(p: Floats, temperature: float, bias: Sequence[float]) -> Floats:
    z = np.log(np.maximum(p, 1e-12)) / temperature + np.asarray(bias)
    z = np.exp(z - z.max(1, keepdims=True))
    return np.asarray(z / z.sum(1, keepdims=True))


def worst_of(p: Floats, owner: Sequence[int], n: int) -> Floats:
    """Per example the window with the least P(benign)."""
    out = np.zeros((n, p.shape[1]))
    out[:, 0] = 2.0
    for row, k in zip(p, owner, strict=True):
        if row[0] < out[k, 0]:
            out[k] = row
    return out


def threshold_at(benign: Floats, rate: float) -> float:
    """The least malicious score that at most this share of benign examples exceeds."""
    if not len(benign):
        return 1.0
    ordered = np.sort(benign)
    return float(ordered[min(len(ordered) - 1, math.ceil(len(ordered) * (1.0 - rate)))])


def reliability(malicious: Floats, hostile: NDArray[np.bool_], bins: int = 10) -> tuple[float, list[dict[str, float]]]:
    """(expected calibration error, bins of predicted and observed shares)."""
    out, error = [], 0.0
    at = np.minimum((malicious * bins).astype(int), bins - 1)
    for k in range(bins):
        here = at == k
        if here.any():
            said, was = float(malicious[here].mean()), float(hostile[here].mean())
            out.append({"n": int(here.sum()), "predicted": round(said, 4), "observed": round(was, 4)})
            error += abs(said - was) * float(here.mean())
    return round(error, 4), out


def describe(out: Path, **fields: Any) -> dict[str, Any]:
    """judge.json of an embedded judge; returns it as it stands there."""
    made = {
        "kind": "embedded",
        "tokenizer": "tokenizer.json",
        "prefix": [ENTRY],
        "suffix": [VERDICT],
        "labels": {label: f"<|{label}|>" for label in LABELS},
        "entry_chars": ENTRY_CHARS,
        "window_chars": WINDOW_CHARS,
        "windows_max": WINDOWS_MAX,
        "min_mass": 0.5,
        **fields,
    }
    write_manifest(out, made)
    written: dict[str, Any] = json.loads((out / MANIFEST).read_text())
    return written


# ---------------------------------------------------------------- all of it


def train(
    sources: Sequence[Path],
    out: Path,
    *,
    seed: int = 0,
    shape: Shape | None = None,
    licences: dict[str, str] | None = None,
    leave_out: Sequence[str] = (),
    name: str = "",
    threads: int = 1,
    tell: Tell = lambda stage, share: None,
) -> dict[str, Any]:
    """Train, convert, calibrate, and write a judge folder; what is there is replaced. Returns its manifest.

    leave_out: sources (a file's name without its ending) that are measured and not trained on. Raises
    JudgeTrainingError."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise JudgeTrainingError(
            f"{error.name} is missing: training needs torch and transformers (pip install torch transformers)"
        ) from error
    from native.text import TextHost
    from sidecar.core import DEFAULT_BUNDLE
    from sidecar.judge.scorer import Scorer

    shape = shape or Shape()
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    used = [p for p in sources if p.name.split(".")[0] not in leave_out]
    tell("reading", 0.0)
    data = read(used, seed, shape.grammar_texts)
    host = TextHost(DEFAULT_BUNDLE / "linear.bin")
    score: Score = host.text_scores
    told = stories(scenarios(seed + 1, 3), seed, 3600)
    made = examples_of(data, told, "train", score, shape, seed)
    held = examples_of(data, stories(scenarios(seed + 2, 1), seed + 1, 2000), "calibrate", score, shape, seed, 0.15)
    kinds = Counter(example.label for example in made)
    if kinds["benign"] < 20 or len(kinds) < 2:
        raise JudgeTrainingError(
            f"{kinds['benign']} benign examples and {len(made) - kinds['benign']} others: give both kinds"
        )
    if len(held) < 20 or len({example.label == "benign" for example in held}) < 2:
        raise JudgeTrainingError(
            "too few groups (sites, repositories, payload files) to hold some back for calibration; give more"
        )
    tell("tokenizer", 0.0)
    rng = random.Random(f"{seed}:tokenizer")
    sample = rng.sample(made, min(len(made), 30_000))
    tokenizer = train_tokenizer(
        [text for example in sample for text in entries(example, rng, most=1)], shape.vocabulary
    )
    encoder = Encoder(tokenizer, shape.tokens_max)
    rows = rows_of(made, encoder, seed)
    model = build(shape, tokenizer.get_vocab_size(), seed)
    fitted = fit(model, rows, encoder, shape, seed, tell)
    tell("converting", 0.0)
    fresh = out.with_name(f".{out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    convert(model, tokenizer, fresh)
    tell("calibrating", 0.0)
    checked = rows_of(held, encoder, seed)
    exact = torch_probabilities(model, checked.tokens, encoder)
    scorer = Scorer(fresh)
    quantised = scorer.probabilities(checked.tokens)
    labels = np.array([LABELS.index(example.label) for example in held])
    worst = worst_of(quantised[:, :-1], checked.owner, len(held))
    present = worst[:, 0] <= 1.0
    temperature, bias = fit_calibration(np.log(np.maximum(worst[present], 1e-12)), labels[present])
    sure = calibrated(worst[present], temperature, bias)
    malicious = 1.0 - sure[:, 0]
    benign = malicious[labels[present] == 0]
    thresholds = {f"{rate:g}": round(threshold_at(benign, rate), 6) for rate in FALSE_POSITIVE_RATES}
    ece, bins = reliability(malicious, labels[present] != 0)
    flips = _flips(
        calibrated(exact[:, :-1], temperature, bias), calibrated(quantised[:, :-1], temperature, bias), thresholds
    )
    sources_used = {
        **{p.name: {"licence": (licences or {}).get(p.name, "not stated")} for p in used},
        "attack_grammar": {"licence": "of this project"},
        "benign_grammar": {"licence": "of this project"},
        "simulated": {"licence": "of this project"},
    }
    by_source = Counter(example.source for example in made)
    for source, entry in sources_used.items():
        entry["examples"] = by_source[source.split(".")[0]]  # type: ignore[assignment]
    parameters = sum(p.numel() for p in model.parameters())
    manifest = describe(
        fresh,
        name=name or out.name,
        max_tokens=shape.tokens_max,
        parameters=parameters,
        quantization="int8",
        calibration={
            "temperature": round(temperature, 6),
            "bias": dict(zip(LABELS, bias, strict=True)),
            "ece": ece,
            "reliability": bins,
        },
        thresholds={"malicious": thresholds},
        training={
            "seed": seed,
            "shape": asdict(shape),
            "examples": dict(kinds),
            "sources": sources_used,
            **fitted,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        metrics={
            "calibration_examples": len(held),
            "tokens_mean": round(float(np.mean([len(t) for t in rows.tokens])), 1),
            "int8": flips,
            "classes": class_table(sure, labels[present], thresholds),
        },
    )
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
    return manifest


def _flips(exact: Floats, quantised: Floats, thresholds: dict[str, float]) -> dict[str, Any]:
    """How int8 differs from float32: verdicts, and sides of each threshold."""
    a, b = 1.0 - exact[:, 0], 1.0 - quantised[:, 0]
    return {
        "windows": len(a),
        "labels_changed": int((exact.argmax(1) != quantised.argmax(1)).sum()),
        "crossed": {rate: int(((a >= t) != (b >= t)).sum()) for rate, t in thresholds.items()},
        "probability_change_max": round(float(np.abs(exact - quantised).max()), 4),
    }


def class_table(sure: Floats, labels: NDArray[np.integer[Any]], thresholds: dict[str, float]) -> dict[str, Any]:
    """Per label: how many, how many flagged at each threshold, and how many given this very label."""
    out: dict[str, Any] = {}
    for k, label in enumerate(LABELS):
        here = labels == k
        if here.any():
            row = {"examples": int(here.sum()), "same_label": round(float((sure[here].argmax(1) == k).mean()), 4)}
            for rate, threshold in thresholds.items():
                row[f"flagged_at_{rate}"] = round(float((1.0 - sure[here, 0] >= threshold).mean()), 4)
            out[label] = row
    return out
