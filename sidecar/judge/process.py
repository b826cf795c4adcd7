"""The process of a judge: loads the models, works until its standard input closes or it is told to stop.

python -m sidecar.judge.process CONFIG        beside a sidecar, which reads its standard output
outrider judge serve -c CONFIG                on a machine of its own
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sidecar.config import Settings
from sidecar.config.judge import JudgeModelSettings
from sidecar.config.judge_store import JudgeStore
from sidecar.judge.folder import ModelError
from sidecar.judge.model import JudgeModel
from sidecar.judge.store import open_store
from sidecar.judge.verdicts import Rules
from sidecar.judge.worker import Plan, Worker
from sidecar.serve.metrics import Tally

STATUS_EVERY_S = 1.0
EXIT_MODELS = 4
FALSE_POSITIVES = "0.001"  # the rate whose threshold is used
DEFAULT_MODEL = Path(__file__).parent / "default_model"

log = logging.getLogger("outrider.judge")


def open_models(wanted: Sequence[JudgeModelSettings]) -> list[JudgeModel]:
    """All of them, or ModelError naming the one that can't be had."""
    models = []
    for one in wanted:
        folder = DEFAULT_MODEL if one.path == "default" else Path(one.path)
        model = JudgeModel.open(
            folder,
            device=one.device,
            compute_type=one.compute_type,
            device_index=list(one.device_indices),
            intra_threads=one.threads,
        )
        log.info(
            "judge model ready",
            extra={
                "name_": one.name,
                "model": model.hash,
                "device": model.device,
                "device_wanted": one.device,
                "compute_type": model.compute_type,
                "folder": folder,
            },
        )
        models.append(model)
    return models


def threshold_of(model: JudgeModel) -> float:
    """P(attack) from which it flags, as calibrated; 1.0, and said, for a model that never was: it flags nothing until
    judge.verdicts.flag is set."""
    known = model.manifest.thresholds.get("malicious", {}).get(FALSE_POSITIVES)
    if known is None:
        log.warning(
            "this judge isn't calibrated: it flags nothing unless judge.verdicts.flag says from which probability",
            extra={"folder": model.folder},
        )
        return 1.0
    return known


def store_settings(settings: Settings) -> JudgeStore:
    """judge_store with its path filled in."""
    store = settings.judge_store
    return store.model_copy(update={"path": store.path or f"{settings.arena.path}.judge.db"})


def plan_of(settings: Settings, models: Sequence[JudgeModel], name: str) -> Plan:
    verdicts = settings.judge.verdicts
    return Plan(
        name=name,
        batch=settings.judge.batch,
        deadline_s=settings.judge.deadline_s,
        rules=Rules(
            action=verdicts.action,
            flag=verdicts.flag,
            duration_s=verdicts.duration_s,
            duration_max_s=verdicts.duration_max_s,
            repeat=verdicts.repeat,
            repeat_window_s=verdicts.repeat_window_s,
            principals=verdicts.principals,
            allow=tuple(settings.lists.allow),
        ),
        thresholds={model.hash: threshold_of(model) for model in models},
    )


def work(settings: Settings, stopping: threading.Event, tell: Callable[[Mapping[str, Any]], None]) -> None:
    """Judge until `stopping`. tell: what there is to know, once a second. ModelError, or StoreError where the store's
    settings are wrong."""
    tally = Tally()
    name = f"{socket.gethostname()}:{os.getpid()}"
    with open_store(store_settings(settings)) as store:
        models = open_models(settings.judge.models)
        worker = Worker(store, models, plan_of(settings, models, name), tally)

        def status() -> dict[str, Any]:
            counts: dict[str, dict[str, int]] = {}
            for (metric, label), n in tally.all().items():
                counts.setdefault(metric, {})[label] = n
            return {
                "ready": True,
                "counts": counts,
                "store": store.stats(),
                "models": [
                    {"name": one.name, "hash": model.hash, "device": model.device, "compute_type": model.compute_type}
                    for one, model in zip(settings.judge.models, models, strict=True)
                ],
            }

        def report() -> None:
            while not stopping.wait(STATUS_EVERY_S):
                tell(status())

        tell(status())
        reporter = threading.Thread(target=report, name="judge-status", daemon=True)
        reporter.start()
        worker.run(stopping)


def stopped_by_signals() -> threading.Event:
    """Set when the process is told to end: SIGTERM, Ctrl-C."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    return stopping


def give_way(settings: Settings) -> None:
    from sidecar.judge.child import chosen_cpus

    os.nice(settings.judge.nice)
    try:
        os.sched_setaffinity(0, chosen_cpus(settings.judge))
    except OSError as error:
        log.warning("the judge's CPUs can't be chosen", extra={"why": str(error)})


def main() -> int:
    from sidecar.serve import logs
    from sidecar.serve.app import read_settings

    settings = read_settings(Path(sys.argv[1]))
    logs.set_up(settings.log.level, settings.log.format)
    give_way(settings)
    stopping = stopped_by_signals()

    def watch_parent() -> None:
        while sys.stdin.buffer.read(4096):
            pass
        stopping.set()

    threading.Thread(target=watch_parent, name="parent", daemon=True).start()

    def tell(status: Mapping[str, Any]) -> None:
        try:
            print(json.dumps(status), flush=True)
        except OSError:
            stopping.set()

    try:
        work(settings, stopping, tell)
    except ModelError as error:
        log.error("the judge's model is refused", extra={"why": str(error)})
        return EXIT_MODELS
    return 0


if __name__ == "__main__":
    sys.exit(main())
