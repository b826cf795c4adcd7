"""How fast a GPU judges: CTranslate2 against transformers, random weights in the shapes of Llama 3.2-1B and 3.1-8B.

    python -m bench.judge_gpu --out out/judge-gpu            # on a machine with a GPU: a few minutes
    python bench/judge_gpu.py --device cpu --shape embedded  # tries the script itself

One judging is what the judge does with a request: a prompt whose first tokens are always the same, one forward, the
answer read from the logits of the next token (best label, and the labels' share of the whole vocabulary). Speed doesn't
depend on what the weights are, so they are drawn here; nothing is downloaded. Each backend runs in a process of its own
(memory is given back, a crash ends one backend only), and results are written after every point, so that a run cut
off by --budget-s still leaves a table.

Needs numpy, torch and transformers; ctranslate2 if it is to be measured. This file imports nothing of the project, so
that it can be copied to the machine alone.

ctranslate2's wheel opens libcublas.so.12 by name. Where only cuBLAS 13 is installed, links of that name are
put into a folder of the run's own: of cuBLAS it calls ten functions of the C interface, which both majors have. Whether
that works is tried on a small model first (logits on the GPU against logits on the CPU), and the report says which file
was used.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import select
import shutil
import site
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

LABELS = 8
WARM_UPS = 2
LEAST_SAMPLES = 3
SMALLEST_S = 25.0  # a backend isn't started with less of the budget left
WEIGHTS_BYTES = 16 << 30


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    heads_kv: int
    inner: int
    vocabulary: int
    tied: bool


SHAPES = {
    "smoke": Shape(128, 2, 4, 2, 256, 512, False),
    "embedded": Shape(128, 4, 4, 2, 352, 2048, True),
    "1B": Shape(2048, 16, 32, 8, 8192, 128256, True),
    "8B": Shape(4096, 32, 32, 8, 14336, 128256, False),
}


@dataclass(frozen=True)
class Point:
    shape: str
    backend: str
    compute: str
    prefix: int  # tokens that every prompt begins with
    tokens: int  # of the whole prompt
    batch: int
    per_second: float  # requests, two batches in flight
    batch_p50_ms: float  # one batch in flight
    batch_p99_ms: float
    samples: int
    error: str = ""


# ---- weights -------------------------------------------------------------------------------------------------------


def draw(shape: Shape, seed: int = 7) -> Iterator[tuple[str, np.ndarray]]:
    """Names as transformers has them; 8-bit weights, to be divided by scale()."""
    rng = np.random.default_rng(seed)
    head = shape.hidden // shape.heads

    def weights(rows: int, columns: int) -> np.ndarray:
        return rng.integers(-127, 128, (rows, columns), dtype=np.int8)

    yield "model.embed_tokens.weight", weights(shape.vocabulary, shape.hidden)
    kinds: list[dict[str, np.ndarray]] = []
    for index in range(shape.layers):
        if len(kinds) < 2:  # the others take turns: drawing 8 GB would take a minute
            kinds.append(
                {
                    "self_attn.q_proj": weights(shape.hidden, shape.hidden),
                    "self_attn.k_proj": weights(shape.heads_kv * head, shape.hidden),
                    "self_attn.v_proj": weights(shape.heads_kv * head, shape.hidden),
                    "self_attn.o_proj": weights(shape.hidden, shape.hidden),
                    "mlp.gate_proj": weights(shape.inner, shape.hidden),
                    "mlp.up_proj": weights(shape.inner, shape.hidden),
                    "mlp.down_proj": weights(shape.hidden, shape.inner),
                }
            )
        for name, drawn in kinds[index % 2].items():
            yield f"model.layers.{index}.{name}.weight", drawn
    if not shape.tied:
        yield "lm_head.weight", weights(shape.vocabulary, shape.hidden)


def scale(shape: Shape) -> float:
    """Uniform 8-bit numbers have a deviation of 73; the weights get 1/sqrt(hidden), so that signals keep their size."""
    return 73.0 * shape.hidden**0.5


def write_ct2(folder: Path, shape: Shape) -> None:
    """A CTranslate2 folder with 8-bit weights, without a model of torch's in between (for 8B that takes minutes)."""
    from ctranslate2.specs import common_spec, transformer_spec

    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        shape.layers,
        shape.heads,
        activation=common_spec.Activation.SWISH,
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=False,
        rotary_base=500000.0,
        num_heads_kv=shape.heads_kv,
    )
    drawn = draw(shape)
    by = np.float32(scale(shape))

    def take(linear: Any, matrices: int = 1) -> None:
        parts = [next(drawn)[1] for _ in range(matrices)]
        linear.weight = parts[0] if matrices == 1 else np.concatenate(parts)
        linear.weight_scale = np.full(len(linear.weight), by, dtype=np.float32)

    decoder = spec.decoder
    decoder.scale_embeddings = False
    ones = np.ones(shape.hidden, dtype=np.float32)
    take(decoder.embeddings)
    for layer in decoder.layer:
        layer.self_attention.layer_norm.gamma = ones
        layer.ffn.layer_norm.gamma = ones
        take(layer.self_attention.linear[0], 3)
        take(layer.self_attention.linear[1])
        take(layer.ffn.linear_0)
        take(layer.ffn.linear_0_noact)
        take(layer.ffn.linear_1)
    decoder.layer_norm.gamma = ones
    if shape.tied:
        decoder.projection.weight = decoder.embeddings.weight
        decoder.projection.weight_scale = decoder.embeddings.weight_scale
    else:
        take(decoder.projection)
    spec.register_vocabulary([f"t{index}" for index in range(shape.vocabulary)])
    spec.config.layer_norm_epsilon = 1e-5
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = "t0", "t1", "t2"
    spec.validate()
    if shape.tied:  # after validate(), which wraps values; a string names another variable
        decoder.projection.weight = "decoder/embeddings/weight"
        decoder.projection.weight_scale = "decoder/embeddings/weight_scale"
    folder.mkdir(parents=True)
    spec.save(str(folder))


def torch_llama(shape: Shape, device: str, dtype: Any, exact: bool) -> Any:
    """exact: the very weights of write_ct2 (slow for the large ones); else drawn on the device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads_kv,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=shape.tied,
        attn_implementation="sdpa",
        dtype=dtype,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    if exact:
        state = {name: torch.from_numpy(w.astype(np.float32) / np.float32(scale(shape))) for name, w in draw(shape)}
        left = model.load_state_dict(state, strict=False)
        if left.unexpected_keys:
            raise SystemExit(f"transformers' Llama has no {left.unexpected_keys[:3]}")
    return model.eval()


# ---- backends: submit(batch) starts the work, the function that it returns waits for labels and mass ----------------

Wait = Callable[[], list[tuple[int, float]]]


def read_logits(logits: np.ndarray, label_ids: np.ndarray) -> tuple[int, float]:
    top = logits.max()
    total = np.exp(logits - top).sum()
    labels = np.exp(logits[label_ids] - top)
    return int(labels.argmax()), float(labels.sum() / total)


class CTranslate2:
    def __init__(self, folder: Path, device: str, compute: str, prefix: list[int], vocabulary: int) -> None:
        import ctranslate2

        self._library = ctranslate2
        self._generator = ctranslate2.Generator(
            str(folder), device=device, compute_type=compute, inter_threads=1, intra_threads=1, max_queued_batches=-1
        )
        self.compute = self._generator.compute_type
        self._tokens = [f"t{index}" for index in range(vocabulary)]
        self._prefix = [self._tokens[index] for index in prefix]
        self._labels = np.arange(3, 3 + LABELS)

    def numpy(self, view: Any) -> np.ndarray:
        view = view.to(self._library.DataType.float32).to_device(self._library.Device.cpu)
        return np.array(view).reshape(-1)

    def submit(self, batch: np.ndarray) -> Wait:
        futures = self._generator.generate_batch(
            [[self._tokens[index] for index in row] for row in batch],
            asynchronous=True,
            max_length=1,
            include_prompt_in_result=False,
            return_logits_vocab=True,
            static_prompt=self._prefix,
        )
        return lambda: [read_logits(self.numpy(future.result().logits[0][-1]), self._labels) for future in futures]

    def logits(self, batch: np.ndarray) -> np.ndarray:
        prompts = [self._prefix + [self._tokens[index] for index in row] for row in batch]
        results = self._generator.generate_batch(
            prompts, max_length=1, include_prompt_in_result=False, return_logits_vocab=True
        )
        return np.stack([self.numpy(result.logits[0][-1]) for result in results])


class Transformers:
    def __init__(self, model: Any, device: str, prefix: list[int], cached: bool) -> None:
        import torch

        self._torch, self._model, self._device = torch, model, device
        self._prefix = torch.tensor([prefix], device=device)
        self._labels = torch.arange(3, 3 + LABELS, device=device)
        self._cached = cached
        self._cache: Any = None
        self._cache_rows = 0
        self.compute = str(next(model.parameters()).dtype).removeprefix("torch.")

    def forward(self, batch: np.ndarray) -> Any:
        ids = self._torch.from_numpy(batch).to(self._device, non_blocking=True)
        prefix = self._prefix.expand(len(batch), -1)
        with self._torch.inference_mode():
            if not self._cached:
                ids = self._torch.cat([prefix, ids], dim=1)
                return self._model(ids, logits_to_keep=1, use_cache=False).logits[:, -1].float()
            if self._cache_rows != len(batch):
                from transformers import DynamicCache

                self._cache, self._cache_rows = DynamicCache(), len(batch)
                self._model(prefix, past_key_values=self._cache, logits_to_keep=1, use_cache=True)
            logits = self._model(ids, past_key_values=self._cache, logits_to_keep=1, use_cache=True).logits[:, -1]
            self._cache.crop(-ids.shape[1])
            return logits.float()

    def submit(self, batch: np.ndarray) -> Wait:
        logits = self.forward(batch)
        with self._torch.inference_mode():
            labels = logits[:, self._labels]
            mass = (labels.logsumexp(1) - logits.logsumexp(1)).exp()
            answer = self._torch.stack([labels.argmax(1).float(), mass])
        return lambda: [(int(label), float(share)) for label, share in zip(*answer.cpu().tolist(), strict=True)]

    def logits(self, batch: np.ndarray) -> np.ndarray:
        logits: np.ndarray = self.forward(batch).cpu().numpy()
        return logits


# ---- measuring -----------------------------------------------------------------------------------------------------


def measure(submit: Callable[[np.ndarray], Wait], batches: Iterator[np.ndarray], seconds: float) -> dict[str, Any]:
    """seconds for each of the two passes: one batch at a time for the latency, two in flight for the throughput."""
    for _ in range(WARM_UPS):
        submit(next(batches))()
    took: list[float] = []
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds or len(took) < LEAST_SAMPLES:
        batch = next(batches)
        before = time.perf_counter()
        submit(batch)()
        took.append(time.perf_counter() - before)
    waiting = deque([submit(next(batches))])
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds or done < LEAST_SAMPLES:
        waiting.append(submit(next(batches)))
        waiting.popleft()()
        done += 1
    for wait in waiting:
        wait()
        done += 1
    per_batch = (time.perf_counter() - begun) / done
    return {
        "per_batch_s": per_batch,
        "p50_ms": 1e3 * statistics.median(took),
        "p99_ms": 1e3 * float(np.percentile(took, 99)),
        "samples": len(took),
    }


def endless(shape: Shape, batch: int, tokens: int) -> Iterator[np.ndarray]:
    """Requests drawn before the clock runs, and different ones in every batch."""
    rng = np.random.default_rng(batch * 100_003 + tokens)
    drawn = [rng.integers(3 + LABELS, shape.vocabulary, (batch, tokens), dtype=np.int64) for _ in range(16)]
    index = 0
    while True:
        yield drawn[index % len(drawn)]
        index += 1


def say(kind: str, **fields: Any) -> None:
    print(json.dumps({"kind": kind, **fields}), flush=True)


def child_smoke(options: argparse.Namespace) -> None:
    """Says whether CTranslate2 gives on the device what it and transformers give on the CPU in float32."""
    import torch

    shape = SHAPES["smoke"]
    folder = Path(options.model)
    write_ct2(folder, shape)
    prefix = list(range(20, 36))
    batch = np.random.default_rng(1).integers(11, shape.vocabulary, (4, 40), dtype=np.int64)
    reference = Transformers(torch_llama(shape, "cpu", torch.float32, exact=True), "cpu", prefix, False).logits(batch)
    for device, dtype in (("cpu", torch.float32), (options.device, torch.bfloat16)):
        cached = Transformers(torch_llama(shape, device, dtype, exact=True), device, prefix, True)
        cached.logits(batch[::-1].copy())
        error = float(np.linalg.norm(cached.logits(batch) - reference)) / float(np.linalg.norm(reference))
        say("note", text=f"transformers-prefix {cached.compute}, {device}: relative error of the logits {error:.2g}")
    on_cpu = CTranslate2(folder, "cpu", "float32", prefix, shape.vocabulary).logits(batch)
    size = float(np.linalg.norm(reference))
    error = float(np.linalg.norm(on_cpu - reference)) / size
    say("smoke", what="ctranslate2 float32, cpu", error=error, ok=bool(error < 1e-3))
    for compute in options.computes.split(","):
        backend = CTranslate2(folder, options.device, compute, prefix, shape.vocabulary)
        error = float(np.linalg.norm(backend.logits(batch) - reference)) / size
        label = [label for label, _ in backend.submit(batch)()]
        same = sum(a == b for a, b in zip(label, reference[:, 3 : 3 + LABELS].argmax(1).tolist(), strict=True))
        say("smoke", what=f"ctranslate2 {backend.compute}, {options.device}", error=error, ok=bool(error < 0.08))
        say("note", text=f"ctranslate2 {backend.compute}: labels by the kept prefix agree on {same} of {len(batch)}")


def child_points(options: argparse.Namespace) -> None:
    shape = SHAPES[options.shape]
    prefix = [11 + index % (shape.vocabulary - 11) for index in range(options.prefix)]
    started = time.perf_counter()
    make: Callable[[], Any]
    name = options.child
    if name == "ctranslate2":
        make = partial(CTranslate2, Path(options.model), options.device, options.computes, prefix, shape.vocabulary)
    else:
        import torch

        dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
        model = torch_llama(shape, options.device, dtype, exact=False)
        make = partial(Transformers, model, options.device, prefix, name == "transformers-prefix")
    backend = make()
    say("note", text=f"{options.shape} {name} {backend.compute}: ready after {time.perf_counter() - started:.1f} s")
    for tokens in options.tokens:
        for batch in options.batches:
            point = partial(
                Point,
                shape=options.shape,
                backend=name,
                compute=backend.compute,
                prefix=options.prefix,
                tokens=tokens,
                batch=batch,
            )
            try:
                got = measure(backend.submit, endless(shape, batch, tokens - options.prefix), options.seconds_per_point)
            except RuntimeError as error:  # out of memory, mostly
                failed = point(per_second=0.0, batch_p50_ms=0.0, batch_p99_ms=0.0, samples=0, error=str(error)[:200])
                say("point", **asdict(failed))
                break
            say(
                "point",
                **asdict(
                    point(
                        per_second=batch / got["per_batch_s"],
                        batch_p50_ms=got["p50_ms"],
                        batch_p99_ms=got["p99_ms"],
                        samples=got["samples"],
                    )
                ),
            )
    say("note", text=f"{options.shape} {name} {backend.compute}: GPU memory in use {gpu('memory.used')}")


# ---- the parent ----------------------------------------------------------------------------------------------------


def gpu(fields: str) -> str:
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "no GPU"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in (
        "ctranslate2",
        "torch",
        "transformers",
        "tokenizers",
        "numpy",
        "nvidia-cublas",
        "nvidia-cublas-cu12",
    ):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} threads"
    return platform.machine()


def cublas_folders(link: Path) -> Iterator[tuple[str, str]]:
    """What to put before LD_LIBRARY_PATH so that libcublas.so.12 is found, best first, and what that is."""
    yield "", "as the machine's loader finds it"
    roots = [*site.getsitepackages(), *sys.path, "/usr/local", "/usr/lib", "/opt"]
    found: dict[str, Path] = {}
    for root in dict.fromkeys(roots):
        if root and Path(root).is_dir():
            for path in Path(root).rglob("libcublas.so.1[23]"):
                found.setdefault(str(path.resolve()), path)
    for path in found.values():
        if path.name.endswith(".12"):
            yield str(path.parent), str(path)
    for number, path in enumerate(found.values()):
        light = path.parent / "libcublasLt.so.13"
        if path.name.endswith(".13") and light.exists():
            folder = link / str(number)
            folder.mkdir(parents=True)
            for name, target in (("libcublas", path), ("libcublasLt", light)):
                (folder / f"{name}.so.12").symlink_to(target)
                (folder / f"{name}.so.13").symlink_to(target)
            yield f"{folder}:{path.parent}", f"{path} under the name libcublas.so.12"


class Run:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.ends = time.monotonic() + options.budget_s
        self.out = Path(options.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.points: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.smoke: list[dict[str, Any]] = []
        self.environment = dict(os.environ)
        self.cublas = "none"
        self.hardware = {
            "gpu": gpu("name,driver_version,memory.total"),
            "cpu": processor(),
            "versions": versions(),
        }

    def left_s(self) -> float:
        return self.ends - time.monotonic()

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(f"# {text}", flush=True)
        self.write()

    def child(self, *arguments: str) -> bool:
        """Runs one backend; False if it failed. What it printed so far is kept in either case."""
        command = [sys.executable, "-u", __file__, *arguments]
        command += ["--device", self.options.device, "--seconds-per-point", str(self.options.seconds_per_point)]
        command += ["--prefix", str(self.options.prefix)]
        command += ["--tokens", *map(str, self.options.tokens), "--batches", *map(str, self.options.batches)]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=self.environment)
            with process:
                try:
                    assert process.stdout is not None
                    self._read(process.stdout.fileno())
                finally:
                    if self.left_s() <= 0:
                        process.kill()
                    process.wait()
            errors.seek(0)
            said = errors.read()
        if process.returncode:
            tail = " | ".join(said.strip().splitlines()[-4:])[-600:]
            self.note(f"{' '.join(arguments[:6])} ended with {process.returncode}: {tail or 'out of time'}")
        return process.returncode == 0

    def _read(self, pipe: int) -> None:
        held = b""
        while self.left_s() > 0:
            if not select.select([pipe], [], [], min(1.0, max(0.0, self.left_s())))[0]:
                continue
            chunk = os.read(pipe, 65536)
            if not chunk:
                return
            *lines, held = (held + chunk).split(b"\n")
            for line in lines:
                self._take(line)
        self.note("the budget is used up: what is missing was not measured")

    def _take(self, line: bytes) -> None:
        try:
            got = json.loads(line)
        except ValueError:
            return
        kind = got.pop("kind")
        if kind == "point":
            self.points.append(got)
            print(row(got), flush=True)
        elif kind == "smoke":
            self.smoke.append(got)
            print(f"# {got['what']}: relative error of the logits {got['error']:.2g} {'' if got['ok'] else 'WRONG'}")
        else:
            self.note(got["text"])
        self.write()

    def write(self) -> None:
        found = {
            "hardware": {**self.hardware, "cublas": self.cublas},
            "smoke": self.smoke,
            "notes": self.notes,
            "points": self.points,
        }
        (self.out / "judge-gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        (self.out / "judge-gpu.md").write_text(markdown(found))


HEAD = ("shape", "backend", "type", "tokens", "batch", "requests/s", "batch p50 ms", "batch p99 ms")


def row(point: dict[str, Any]) -> str:
    cells = [point["shape"], point["backend"], point["compute"], point["tokens"], point["batch"]]
    if point["error"]:
        return "| " + " | ".join(map(str, cells)) + f" | {point['error'].splitlines()[0][:80]} | | |"
    cells += [f"{point['per_second']:,.1f}", f"{point['batch_p50_ms']:.2f}", f"{point['batch_p99_ms']:.2f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def markdown(found: dict[str, Any]) -> str:
    hardware = found["hardware"]
    lines = [
        "# Judging on a GPU",
        "",
        f"- GPU (name, driver, memory): {hardware['gpu']}; processor: {hardware['cpu']}",
        "- " + ", ".join(f"{name} {number}" for name, number in hardware["versions"].items()),
        f"- cuBLAS for ctranslate2: {hardware['cublas']}",
        *(f"- {one['what']}: relative error of the logits {one['error']:.2g}" for one in found["smoke"]),
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---|---|---|---:|---:|---:|---:|---:|",
        *map(row, found["points"]),
        "",
        "Random weights. `ctranslate2` and `transformers-prefix` keep the state of the prompts' common beginning;",
        "`transformers` computes it anew. requests/s with two batches in flight, times with one.",
        "",
        *(f"- {note}" for note in found["notes"]),
    ]
    return "\n".join(lines) + "\n"


def parent(options: argparse.Namespace) -> int:
    run = Run(options)
    work = Path(tempfile.mkdtemp(dir=options.work or roomy()))
    try:
        computes = options.computes.split(",")
        usable = try_ctranslate2(run, work, computes)
        first: list[tuple[str, str, str]] = []
        later: list[tuple[str, str, str]] = []
        for shape in options.shape:
            first += [(shape, "ctranslate2", computes[0])] if usable else []
            first += [(shape, "transformers-prefix", ""), (shape, "transformers", "")]
            later += [(shape, "ctranslate2", compute) for compute in computes[1:]] if usable else []
        for shape, backend, compute in first + later:
            folder = work / shape
            if run.left_s() < SMALLEST_S:
                run.note(f"no time left for {shape} {backend} {compute}")
                continue
            if backend == "ctranslate2" and not folder.exists():
                begun = time.monotonic()
                write_ct2(folder, SHAPES[shape])
                run.note(f"{shape}: weights written in {time.monotonic() - begun:.1f} s")
            run.child("--child", backend, "--shape", shape, "--model", str(folder), "--computes", compute)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        run.write()
    print((run.out / "judge-gpu.md").read_text())
    return 0 if run.points else 1


def roomy() -> str | None:
    """Memory rather than a disk for the weights, where there is room for them."""
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > WEIGHTS_BYTES:
        return str(memory)
    return None


def try_ctranslate2(run: Run, work: Path, computes: list[str]) -> bool:
    try:
        version("ctranslate2")
    except PackageNotFoundError:
        run.note("ctranslate2 is not installed: only transformers is measured")
        return False
    before = run.environment.get("LD_LIBRARY_PATH", "")
    for number, (folders, what) in enumerate(cublas_folders(work / "links")):
        run.smoke.clear()
        run.environment["LD_LIBRARY_PATH"] = ":".join(part for part in (folders, before) if part)
        arguments = ["--child", "smoke", "--shape", "smoke", "--computes", ",".join(computes)]
        if run.child(*arguments, "--model", str(work / f"smoke{number}")) and all(one["ok"] for one in run.smoke):
            run.cublas = what
            run.note(f"ctranslate2 works on {run.options.device}; libcublas.so.12: {what}")
            return True
    run.environment["LD_LIBRARY_PATH"] = before
    run.note(f"ctranslate2 does NOT work on {run.options.device} here: only transformers is measured")
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/judge-gpu", help="folder for judge-gpu.json and judge-gpu.md")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["1B", "8B"])
    parser.add_argument("--computes", default="", help="CTranslate2's types, comma-separated; the first goes first")
    parser.add_argument("--prefix", type=int, default=128, help="tokens that all prompts share")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024], help="of a whole prompt")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--seconds-per-point", type=float, default=1.0, help="of each of the two passes")
    parser.add_argument("--budget-s", type=float, default=430.0, help="stop when this is used up")
    parser.add_argument("--work", default="", help="where the weights are written (10 GB for 8B)")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--model", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.tokens) <= options.prefix:
        parser.error(f"--tokens {min(options.tokens)} must be more than --prefix {options.prefix}")
    if not options.child:
        options.computes = options.computes or ("int8" if options.device == "cpu" else "int8_float16,bfloat16")
        return parent(options)
    options.shape = options.shape[0]
    if options.child == "smoke":
        child_smoke(options)
    else:
        child_points(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
