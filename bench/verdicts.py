"""What a run says in sentences: each host against its goals, then what makes the figures worth less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench import traffic
from bench.hosts import HOSTS, OUTRIDER, PLUGINS
from bench.proxy import Key, Run

FLOOR_RPS, FLOOR_P99, GRPCIO_RPS, SIDECAR_CPU_US = 0.90, 1.15, 2.5, 25.0
PLUGIN_CONNECTIONS = 32  # the plugins' goals are set for
PLUGIN_RPS = {"envoy_plugin": 0.93, "nginx_plugin": 0.85}  # of the proxy alone
PLUGIN_P50 = {"envoy_plugin": 1.10}
PEER_TIMES = 50.0  # as much CPU as Outrider's is what the peer may take, and more
CPU_NOISE_US = 0.05  # what can't be told from nothing
SPREAD_MAX = 1.3  # fastest round to slowest

Row = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """One sentence; good: None where it only informs; caution: about the run, not about what was measured."""

    text: str
    good: bool | None = None
    caution: bool = False


def verdicts(run: Run) -> list[Verdict]:
    """Outrider against the proxy alone, the floor, grpcio and the peer, in plain words; then what is wrong with the
    run."""
    rows = run.rows()
    out: list[Verdict] = []
    for row in rows:
        if row["mode"] == "closed":
            key = ("closed", row["host"], row["case"], float(row["connections"]))
            where = f"{traffic.TITLES[row['case']]}, {row['connections']} connections"
            if row["host"] in ("native", "grpcio"):
                out += behind_envoy(run, row, key, where)
            elif row["host"] in OUTRIDER:
                out += inside(row, where)
            if row["host"] == "nginx_plugin":
                out += against_peer(rows, row, where)
    out += [
        capacity(host, case, rows)
        for case in run.plan.cases
        for host in ("native", "grpcio", "envoy_plugin")
        if any(r["mode"] == "open" and (r["host"], r["case"]) == (host, case) for r in rows)
    ]
    return [*out, *(Verdict(note, caution=True) for note in run.notes), *complaints(rows)]


def behind_envoy(run: Run, row: Row, key: Key, where: str) -> list[Verdict]:
    """The transports against the empty server and each other."""
    host, out = row["host"], []
    share, tail = run.ratio("rps", key, "null_native"), run.ratio("p99_us", key, "null_native")
    if share is not None and tail is not None:
        good = (share >= FLOOR_RPS and tail <= FLOOR_P99) if host == "native" else None
        goal = f" (goal: at least {FLOOR_RPS:.0%}, at most x{FLOOR_P99})" if host == "native" else ""
        out.append(
            Verdict(
                f"{where}: Outrider over {host} does {share:.0%} of the empty server's throughput, "
                f"with x{tail:.2f} of its p99{goal}.",
                good,
            )
        )
    times = run.ratio("rps", key, "grpcio") if host == "native" else None
    if times is not None:
        out.append(
            Verdict(
                f"{where}: native does {times:.1f} times the throughput of grpcio (goal: {GRPCIO_RPS}).",
                times >= GRPCIO_RPS,
            )
        )
    if host == "native" and row["case"] == "get":
        out.append(
            Verdict(
                f"{where}: the sidecar uses {row['cpu_us_sidecar']:.0f} us of CPU per request "
                f"(goal: at most {SIDECAR_CPU_US:.0f}).",
                row["cpu_us_sidecar"] <= SIDECAR_CPU_US,
            )
        )
    return out


def inside(row: Row, where: str) -> list[Verdict]:
    """Against the proxy alone."""
    host, share, slower = row["host"], row["rps_ratio"], row["p50_ratio"]
    if share is None or slower is None:
        return []
    goals, good = [], None
    if host in PLUGIN_RPS and row["connections"] == PLUGIN_CONNECTIONS:
        goals.append(f"at least {PLUGIN_RPS[host]:.0%}")
        good = share >= PLUGIN_RPS[host]
        if host in PLUGIN_P50:
            goals.append(f"at most x{PLUGIN_P50[host]:.2f}")
            good = good and slower <= PLUGIN_P50[host]
    goal = f" (goal: {', '.join(goals)})" if goals else ""
    whose = HOSTS[row["base"]]
    text = f"{where}: {HOSTS[host]} does {share:.0%} of {whose}'s throughput, with x{slower:.2f} of its p50{goal}."
    return [Verdict(text, good)]


def against_peer(rows: Sequence[Row], row: Row, where: str) -> list[Verdict]:
    """Outrider's CPU per request beside the peer's: what each adds to NGINX, and the whole of it."""
    wanted = ("closed", "nginx_modsecurity", row["case"], row["connections"])
    peers = [r for r in rows if (r["mode"], r["host"], r["case"], r["connections"]) == wanted]
    if not peers:
        return []
    out = []
    (peer,) = peers
    added, theirs = row["cpu_us_added"], peer["cpu_us_added"]
    if added is not None and theirs is not None:
        times = f"1/{theirs / added:.0f} of it" if added > CPU_NOISE_US else "less than can be measured"
        out.append(
            Verdict(
                f"{where}: ModSecurity with the CRS adds {theirs:,.0f} us of CPU per request to NGINX, Outrider inside "
                f"it {added:.1f} us (sidecar included): {times} (goal: at most 1/{PEER_TIMES:.0f}).",
                added * PEER_TIMES <= theirs,
            )
        )
    whole, their_whole = row["cpu_us_proxy"] + row["cpu_us_sidecar"], peer["cpu_us_proxy"]
    if whole > 0:
        out.append(
            Verdict(
                f"{where}: all of NGINX with Outrider takes {whole:.1f} us of CPU per request, all of NGINX with "
                f"ModSecurity {their_whole:,.0f} us: {their_whole / whole:.1f} times as much."
            )
        )
    return out


def capacity(host: str, case: str, rows: Sequence[Row]) -> Verdict:
    """Up to which of the constant rates a host kept up."""
    found = [r for r in rows if r["mode"] == "open" and (r["host"], r["case"]) == (host, case)]
    kept = [r for r in found if r["kept_up"]]
    beyond = [r for r in found if not r["kept_up"]]
    title = traffic.TITLES[case]
    if not kept:
        return Verdict(f"{title}: {HOSTS[host]} kept up with none of the arrival rates tried.", False)
    best = kept[-1]
    tail = f"; {beyond[0]['rate']:,.0f}/s was too much" if beyond else ""
    return Verdict(
        f"{title}: at constant arrivals {HOSTS[host]} kept up with {best['rate']:,.0f}/s "
        f"(p50 {best['p50_us'] / 1000:.1f} ms, p99 {best['p99_us'] / 1000:.1f} ms){tail}."
    )


def complaints(rows: Sequence[Row]) -> list[Verdict]:
    """What makes figures worth less: refusals, requests let through unjudged, skipped stages, a wide spread. Rates
    that were too much for a host are left out: it is overload that they show."""
    out, unsteady = [], []
    for row in rows:
        if not row["kept_up"]:
            continue
        where = f"{row['host']}, {row['case']}, " + (
            f"{row['connections']} connections" if row["mode"] == "closed" else f"{row['rate']:,.0f}/s"
        )
        why = "the module had no policy to decide with" if row["host"] in PLUGINS else "ext_proc failed or was too slow"
        for key, words in (
            ("refused", "requests were refused: the traffic should be benign"),
            ("unjudged", f"requests passed unjudged because {why}"),
            ("stages_skipped", "stages were skipped: not all requests were scored in full"),
            ("errors", "requests got no answer"),
        ):
            if row[key]:
                out.append(Verdict(f"{where}: {row[key]:,} {words}.", False))
        unheard = row["requests"] - row["judged"] - row["unjudged"]
        if row["host"] in OUTRIDER and unheard > 0:
            out.append(Verdict(f"{where}: of {unheard:,} answered requests Outrider heard nothing.", False))
        strange = row["non2xx"] - row["refused"]
        if strange > 0 and row["host"] == "nginx_modsecurity":
            share = strange / max(1, row["requests"])
            text = f"{where}: ModSecurity refused {strange:,} of the benign requests ({share:.1%})."
            out.append(Verdict(text, False))
        elif strange > 0:
            out.append(Verdict(f"{where}: {strange:,} answers were neither 2xx nor a decision.", False))
        if row["mode"] == "closed" and row["rps_low"] > 0 and row["rps_high"] / row["rps_low"] > SPREAD_MAX:
            unsteady.append(f"{where} ({row['rps_low']:,.0f} to {row['rps_high']:,.0f}/s)")
    if unsteady:
        text = "Throughput varied much between rounds; a quiet machine or more rounds would say more: "
        out.append(Verdict(text + "; ".join(unsteady) + ".", caution=True))
    return out
