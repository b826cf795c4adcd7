"""The log and the decision log: one harmless line per event, whatever a client sent."""

from __future__ import annotations

import io
import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.serve import logs
from sidecar.serve.decisions import DecisionLog, Plan, sampled
from sidecar.serve.metrics import Tally

HOSTILE = 'x\n{"level":"info"}\r\x1b[2J\x9b31m\u202egpj\u2028\x7f\x00é'


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield root
    for handler in list(root.handlers):
        if handler not in before:
            root.removeHandler(handler)
    root.setLevel(level)


def only_line(text: str) -> str:
    line, rest = text.split("\n")
    assert rest == ""
    assert all(" " <= c <= "~" for c in line), "something else than printable ASCII got out"
    return line


@pytest.mark.parametrize("form", ["json", "text"])
def test_hostile_text_stays_on_one_printable_line(root_logger: logging.Logger, form: str) -> None:
    out = io.StringIO()
    logs.set_up("info", form, out)
    logging.getLogger("outrider.test").info("said %s", HOSTILE, extra={"path": HOSTILE})
    line = only_line(out.getvalue())
    if form == "json":
        event = json.loads(line)
        assert event["message"] == f"said {HOSTILE}"
        assert event["path"] == HOSTILE
        assert event["level"] == "info"
        assert event["logger"] == "outrider.test"


def test_secrets_are_never_written(root_logger: logging.Logger) -> None:
    out = io.StringIO()
    logs.set_up("info", "json", out)
    logging.getLogger("outrider.test").warning(
        "a request",
        extra={
            "Authorization": "Bearer hunter2",
            "set_cookie": "sid=hunter2",
            "api_key": "hunter2",
            "user_password": "hunter2",
            "reason": "fine",
        },
    )
    assert "hunter2" not in out.getvalue()
    event = json.loads(out.getvalue())
    assert event["Authorization"] == "[redacted]"
    assert event["reason"] == "fine"


def test_a_fault_is_logged_with_its_trace_on_one_line(root_logger: logging.Logger) -> None:
    out = io.StringIO()
    logs.set_up("info", "json", out)
    try:
        raise RuntimeError("broken\nhere")
    except RuntimeError:
        logging.getLogger("outrider.test").exception("it failed")
    assert "RuntimeError: broken\nhere" in json.loads(only_line(out.getvalue()))["fault"]


def test_setting_up_again_does_not_write_twice(root_logger: logging.Logger) -> None:
    first, second = io.StringIO(), io.StringIO()
    logs.set_up("debug", "json", first)
    logs.set_up("warning", "text", second)
    logging.getLogger("outrider.test").info("quiet")
    logging.getLogger("outrider.test").error("loud")
    assert first.getvalue() == ""
    assert second.getvalue().count("\n") == 1


# ---- the decision log


class Ring:
    """An event ring filled by hand."""

    def __init__(self, *records: dict[str, Any]) -> None:
        self.records = list(records)

    def drain(self, max_n: int) -> list[dict[str, Any]]:
        taken, self.records = self.records[:max_n], self.records[max_n:]
        return taken


def record(number: int, action: str = "block", **more: Any) -> dict[str, Any]:
    return {
        "id": number,
        "ts": 1.5,
        "client": "192.0.2.1",
        "action": action,
        "score": 0.97,
        "reasons": [{"code": 2, "name": "sql_injection", "value": 0.97}],
        **more,
    }


def plan(
    path: Path | str | None, actions: str = "allow tag throttle challenge block", sample: float = 1.0
) -> Plan:
    return Plan(None if path is None else str(path), frozenset(actions.split()), sample, "shop")


def make(ring: Ring, wanted: Plan, tally: Tally | None = None) -> DecisionLog:
    return DecisionLog(ring, wanted, tally or Tally(), lambda reason, of: f"{of['client']} {reason['name']}")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_record_is_written_with_its_reasons_as_sentences(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    log = make(Ring(record(1, place=HOSTILE, xgboost=float("nan"))), plan(path))
    assert log.pump() == 1
    only_line(path.read_text())
    (written,) = lines(path)
    assert written["reasons"] == [
        {"code": 2, "name": "sql_injection", "value": 0.97, "text": "192.0.2.1 sql_injection"}
    ]
    assert written["service"] == "shop"
    assert written["place"] == HOSTILE
    assert written["xgboost"] is None  # JSON has no NaN
    assert path.stat().st_mode & 0o007 == 0
    log.close()


def test_only_the_actions_asked_for_are_written(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    ring = Ring(record(1, "allow"), record(2, "tag"), record(3, "block"))
    log = make(ring, plan(path, "tag block"))
    log.pump()
    assert [r["id"] for r in lines(path)] == [2, 3]
    log.close()


def test_without_a_path_the_ring_is_emptied_and_nothing_written(tmp_path: Path) -> None:
    ring = Ring(*(record(n) for n in range(10)))
    log = make(ring, plan(None))
    assert log.pump() == 10
    assert ring.records == []
    log.close()


@given(st.floats(0.0, 1.0), st.integers(0, 1 << 40))
def test_a_sample_holds_its_share(share: float, start: int) -> None:
    taken = sum(sampled(number, share) for number in range(start, start + 2000))
    assert abs(taken / 2000 - share) < 0.08


def test_all_and_nothing_are_exact() -> None:
    assert all(sampled(n, 1.0) for n in range(1000))
    assert not any(sampled(n, 0.0) for n in range(1000))


def test_after_rotation_a_new_file_is_written(tmp_path: Path) -> None:
    path, old = tmp_path / "d.jsonl", tmp_path / "d.jsonl.1"
    ring = Ring(record(1))
    log = make(ring, plan(path))
    log.pump()
    path.rename(old)
    ring.records = [record(2)]
    log.pump()
    assert [r["id"] for r in lines(old)] == [1, 2]  # the open file goes on until it is told
    log.reopen()
    ring.records = [record(3)]
    log.pump()
    assert [r["id"] for r in lines(path)] == [3]
    log.close()


def test_new_settings_move_the_log(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    ring = Ring(record(1))
    log = make(ring, plan(first))
    log.pump()
    log.configure(plan(second))
    ring.records = [record(2)]
    log.pump()
    assert ([r["id"] for r in lines(first)], [r["id"] for r in lines(second)]) == ([1], [2])
    log.close()


def test_a_log_that_cannot_be_written_is_counted_and_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tally = Tally()
    path = tmp_path / "gone" / "d.jsonl"
    ring = Ring(record(1), record(2))
    log = make(ring, plan(path), tally)
    with caplog.at_level(logging.ERROR, "outrider.decisions"):
        log.pump()
        ring.records = [record(3)]
        log.pump()
    assert tally.get("decision_log_lines", "failed") == 3
    assert len(caplog.records) == 1  # said once, not per line
    path.parent.mkdir()
    ring.records = [record(4)]
    log.pump()
    assert [r["id"] for r in lines(path)] == [4]
    assert tally.get("decision_log_lines", "written") == 1
    log.close()


def test_standard_output_is_a_path(capsys: pytest.CaptureFixture[str]) -> None:
    log = make(Ring(record(7)), plan("-"))
    log.pump()
    assert json.loads(capsys.readouterr().out)["id"] == 7
    log.close()


def test_closing_writes_what_waits_and_ends_the_thread(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    ring = Ring(*(record(n) for n in range(3000)))
    log = make(ring, plan(path))
    log.start()
    log.close()
    while ring.records:
        log.pump()
    assert not any(thread.name == "decision-log" for thread in threading.enumerate())
    assert len(os.listdir(f"/proc/{os.getpid()}/fd")) < 200


def test_the_watcher_of_files_does_not_talk(root_logger: logging.Logger) -> None:
    """A log that stands beside the configuration would feed on its own lines."""
    out = io.StringIO()
    logs.set_up("debug", "json", out)
    logging.getLogger("watchfiles.main").info("1 change detected")
    assert out.getvalue() == ""
