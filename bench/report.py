"""The benchmark's report: one HTML file without scripts or anything from elsewhere, light or dark as the reader's
system is. Everything that isn't written here is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bench import load, svg, traffic
from bench.hosts import HOSTS
from bench.soak import Soak
from bench.svg import Bar, Line, duration
from bench.verdicts import Verdict

CSS = Path(__file__).with_name("report.css")
NAMES = {
    "bare": "bare",
    "null_native": "empty",
    "native": "native",
    "grpcio": "grpcio",
    "envoy_plugin": "plugin",
    "nginx_bare": "bare",
    "nginx_plugin": "plugin",
    "nginx_auth_request": "auth_request",
    "nginx_modsecurity": "ModSecurity",
}
PROXIES = {"bare": "Envoy", "nginx_bare": "NGINX"}  # by the host that the others are compared with
TAIL_TICKS = ((math.log10(2), "50%"), (1, "90%"), (2, "99%"), (3, "99.9%"), (4, "99.99%"), (5, "99.999%"))
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
Row = Mapping[str, Any]


def short(row: Row) -> str:
    return NAMES.get(row["host"], str(row["host"]))


def render(
    rows: Sequence[Row],
    facts: Mapping[str, str],
    missing: Mapping[str, str] | None = None,
    verdicts: Sequence[Verdict] = (),
    soak: Soak | None = None,
) -> str:
    """The page. rows: as Run.rows() makes them."""
    parts = [head(facts, verdicts, missing or {}, soak)]
    for case in dict.fromkeys(row["case"] for row in rows):
        parts.append(case_section(case, [row for row in rows if row["case"] == case]))
    if soak is not None:
        parts.append(soak_section(soak))
    parts.append(method(facts, bool(rows)))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Outrider under load</title>'
        f"<style>{CSS.read_text(encoding='utf-8')}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def head(
    facts: Mapping[str, str], verdicts: Sequence[Verdict], missing: Mapping[str, str], soak: Soak | None
) -> str:
    items = [(v.text, {True: "good", False: "bad", None: ""}[v.good]) for v in verdicts if not v.caution]
    items += [(f"Not measured: {HOSTS.get(name, name)}: {reason}", "bad") for name, reason in missing.items()]
    if soak is not None:
        items += [(problem, "bad") for problem in soak.problems()] or [("The endurance run passed.", "good")]
    listed = "".join(f'<li class="{css}">{escape(text)}</li>' for text, css in items)
    cautions = "".join(f"<li>{escape(v.text)}</li>" for v in verdicts if v.caution)
    if cautions:
        listed += f'<li class="caution"><details open><summary>Cautions</summary><ul>{cautions}</ul></details></li>'
    where = " · ".join(escape(facts[name]) for name in ("date", "processor", "proxy", "outrider") if name in facts)
    return f'<h1>Outrider under load</h1><p class="soft">{where}</p><ul class="verdicts">{listed}</ul>'


def case_section(case: str, rows: Sequence[Row]) -> str:
    closed = [row for row in rows if row["mode"] == "closed"]
    opened = [row for row in rows if row["mode"] == "open"]
    figures = []
    for base in dict.fromkeys(row["base"] for row in closed):
        for connections in dict.fromkeys(row["connections"] for row in closed):
            found = [row for row in closed if (row["connections"], row["base"]) == (connections, base)]
            figures += ceiling_figures(found, connections, PROXIES[base])
    for base in dict.fromkeys(row["base"] for row in rows):
        ours, theirs = ([row for row in of if row["base"] == base] for of in (closed, opened))
        figures += throughput_figures(ours, theirs, PROXIES[base])
    figures += rate_figures(opened)
    return (
        f"<h2>{escape(traffic.TITLES.get(case, case))}</h2>"
        f'<div class="cards">{"".join(figures)}</div>{table(closed, opened)}'
    )


def figure(title: str, caption: str, drawing: str) -> str:
    return f"<figure>{part(title, caption, drawing)}</figure>" if drawing else ""


def part(title: str, caption: str, drawing: str) -> str:
    return f"<h3>{escape(title)}</h3><figcaption>{escape(caption)}</figcaption>{drawing}"


def ceiling_figures(rows: Sequence[Row], connections: int, proxy: str) -> list[str]:
    rate_bars = [
        Bar(
            short(row),
            row["host"],
            (row["rps"],),
            f"{row['rps']:,.0f}/s" + (f" · {row['rps_ratio']:.0%}" if row["rps_ratio"] else ""),
            f"{HOSTS.get(row['host'], row['host'])}: {row['rps']:,.0f} requests/s "
            f"({row['rps_low']:,.0f} to {row['rps_high']:,.0f} between rounds)",
        )
        for row in rows
    ]
    cpu_bars = [
        Bar(
            short(row),
            row["host"],
            (row["cpu_us_proxy"], row["cpu_us_sidecar"]),
            f"{row['cpu_us_proxy']:.0f}" + (f" + {row['cpu_us_sidecar']:.0f}" if row["cpu_us_sidecar"] else "") + " µs",
            f"{HOSTS.get(row['host'], row['host'])}: {proxy} {row['cpu_us_proxy']} µs, sidecar "
            f"{row['cpu_us_sidecar']} µs per request",
        )
        for row in rows
    ]
    return [
        "<figure>"
        + part(
            f"{proxy}: throughput at {connections} connections",
            f"Closed loop: each connection asks again as soon as it was answered. Share of bare {proxy}.",
            svg.bars(rate_bars, "throughput by host"),
        )
        + part("CPU per request", f"{proxy}, and lighter beside it the sidecar.", svg.bars(cpu_bars, "CPU by host"))
        + "</figure>",
        figure(
            f"{proxy}: latency at the ceiling, {connections} connections",
            "By share of requests; the server is fully loaded, so this is mostly waiting for a turn.",
            tail_chart(rows, "latency by percentile, closed loop"),
        ),
    ]


def tail_chart(rows: Sequence[Row], label: str) -> str:
    """Latency by percentile on a logarithmic tail; only as far out as ten requests of a round reach."""
    lines, reach = [], 1.0
    for row in rows:
        furthest = max(1.0, math.log10(max(10.0, row["requests"] / max(1, row["rounds"]) / 10)))
        reach = max(reach, min(5.0, furthest))
        points = [(i / 10, y) for i, y in enumerate(row["points"]) if i / 10 <= furthest]
        lines.append(Line(short(row), row["host"], points))
    return svg.chart(lines, TAIL_TICKS, (0.0, reach), "share of requests at most this slow", label)


def throughput_figures(closed: Sequence[Row], opened: Sequence[Row], proxy: str) -> list[str]:
    """What is answered: over connections where more than one number was tried, and over what was asked."""
    out = []
    for rows, key, axis, title, caption in (
        (closed, "connections", "connections", "Throughput by connections", "Closed loop: the ceiling at each."),
        (opened, "rate", "asked per second", "Answered by arrival rate", "Open loop: what isn't answered waits."),
    ):
        levels = sorted({row[key] for row in rows})
        if len(levels) < 2:
            continue
        lines = []
        for host in dict.fromkeys(row["host"] for row in rows):
            found = sorted((row for row in rows if row["host"] == host), key=lambda row: row[key])
            tips = [f"{NAMES.get(host, host)}, {r[key]:,.0f} {axis}: {r['rps']:,.0f} answered/s" for r in found]
            lines.append(Line(NAMES.get(host, host), host, [(r[key], r["rps"] / 1000) for r in found], tips=tips))
        ticks = [(level, f"{level:,.0f}") for level in svg.linear_ticks(levels[-1])]
        title = f"{proxy}: {title.lower()}"
        out.append(figure(title, caption, svg.chart(lines, ticks, (0.0, levels[-1]), axis, title, "k/s")))
    return out


def rate_figures(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    rates = sorted({row["rate"] for row in rows})
    lines = []
    for host in dict.fromkeys(row["host"] for row in rows):
        found = sorted((row for row in rows if row["host"] == host), key=lambda row: row["rate"])
        name = NAMES.get(host, host)
        tips = [
            f"{name} at {r['rate']:,.0f}/s: p99 {duration(r['p99_us'])}, p50 {duration(r['p50_us'])}" for r in found
        ]
        lines.append(Line(name, host, [(r["rate"], r["p99_us"]) for r in found], tips=tips))
        lines.append(Line(name, host, [(r["rate"], r["p50_us"]) for r in found], dashed=True, named=False))
    ticks = [(rate, f"{rate:,.0f}") for rate in svg.linear_ticks(rates[-1])]
    out = [
        figure(
            "Latency by arrival rate",
            "Open loop: requests come on schedule, waiting counts. Solid p99, dotted p50; a line ends at the first "
            "rate beyond its host's ceiling.",
            svg.chart(lines, ticks, (0.0, rates[-1]), "requests per second", "latency by arrival rate"),
        )
    ]
    # the highest rate that all hosts were given and answered
    everyone = {row["host"] for row in rows}
    shared = [rate for rate in rates if {r["host"] for r in rows if r["rate"] == rate} == everyone]
    kept_up = [rate for rate in shared if all(r["kept_up"] for r in rows if r["rate"] == rate)]
    if shared:
        rate = (kept_up or shared[:1])[-1]
        found = [row for row in rows if row["rate"] == rate]
        out.append(
            figure(
                f"Latency at {rate:,.0f} requests per second",
                "The same constant arrivals for all: what a client meets below the ceiling.",
                tail_chart(found, f"latency by percentile at {rate:,.0f} requests/s"),
            )
        )
    return out


def table(closed: Sequence[Row], opened: Sequence[Row]) -> str:
    out = [
        "<div class='scroll'><table><thead><tr><th>host</th><th>load</th><th>answered/s</th><th>to bare</th>"
        "<th>p50</th><th>p99</th><th>p99.9</th><th>max</th><th>proxy CPU</th><th>sidecar CPU</th><th>added</th>"
        "<th>sidecar RSS</th><th>non-2xx</th><th>unjudged</th></tr></thead><tbody>"
    ]
    before = None
    for row in (*closed, *opened):
        level = f"{row['connections']} conns" if row["mode"] == "closed" else f"{row['rate']:,.0f}/s"
        first = ' class="first"' if before not in (None, (level, row["base"])) else ""
        before = (level, row["base"])
        load_cell = level if row["kept_up"] else f"{level} (too much)"
        cells = (
            load_cell,
            f"{row['rps']:,.0f}",
            f"{row['rps_ratio']:.2f}" if row["rps_ratio"] else "–",
            *(duration(row[key]) for key in ("p50_us", "p99_us", "p999_us", "max_us")),
            f"{row['cpu_us_proxy']:.1f} µs",
            f"{row['cpu_us_sidecar']:.1f} µs" if row["cpu_us_sidecar"] else "–",
            f"{row['cpu_us_added']:.1f} µs" if row["cpu_us_added"] is not None else "–",
            f"{row['rss_mib_sidecar']:.0f} MiB" if row["rss_mib_sidecar"] else "–",
            f"{row['non2xx']:,}",
            f"{row['unjudged']:,}",
        )
        name = f'<td class="h-{escape(row["host"])}">{escape(row["host"])}</td>'
        out.append(f"<tr{first}>{name}{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return "".join([*out, "</tbody></table></div>"])


def soak_section(soak: Soak) -> str:
    points = [(requests, private / 1024) for requests, _, private, _ in soak.memory]
    shared = [(requests, kib / 1024) for requests, _, _, kib in soak.memory]
    lines = [Line("private", soak.host, points), Line("arena", soak.host, shared, dashed=True)]
    ticks = [(t, f"{t:,.0f}") for t in svg.linear_ticks(float(soak.done))]
    drawing = svg.chart(lines, ticks, (0.0, float(max(soak.done, 1))), "requests", "memory over the run", y_unit="MiB")
    facts = {
        "answered": f"{soak.done:,} requests in {soak.seconds:,.0f} s",
        "not 2xx": f"{soak.non2xx:,}, of which {soak.counts.refused:,} decisions",
        "failed, unjudged": f"{soak.failed:,}, {soak.counts.unjudged:,}",
        "private memory": f"{soak.growth_kib / 1024:+.2f} MiB between the first and the last tenth",
    }
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return (
        f"<h2>Endurance: {escape(soak.host)}, {soak.connections} connections</h2>"
        f'<div class="cards"><div class="card"><h3>Outcome</h3><dl>{listed}</dl></div>'
        f"{figure('Memory of the sidecar', 'Private memory; dotted the shared arena, of fixed size.', drawing)}</div>"
    )


def method(facts: Mapping[str, str], compared: bool) -> str:
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    hosts = "".join(f'<dt class="name h-{k}">{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in HOSTS.items())
    how = (
        "The upstream is an Envoy that answers at once, the same for all. Hosts of Envoy have the same configuration "
        "but for what asks: nothing, the ext_proc filter or Outrider's, in the same place; the empty server and "
        "Outrider are asked for the same messages and bodies. Hosts of NGINX too have the same configuration but for "
        "what asks, and get the very same requests. Outrider runs all detectors and models on every request, and "
        "skips nothing; asked by auth_request it sees no bodies. CPU that is added: of proxy and sidecar, less the proxy's alone. "
        "Percentiles are medians over rounds of each round's; late starts of the load generator beyond "
        f"{load.LATE_US // 1000} ms count as waiting."
    )
    rest = f"<dl>{hosts}</dl>" if compared else ""
    return f'<h2>How it was measured</h2><div class="card"><p>{how}</p><dl>{listed}</dl>{rest}</div>'
