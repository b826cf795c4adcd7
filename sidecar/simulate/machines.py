"""Programs with honest intent: health checks, monitoring, crawlers and integrations."""

from __future__ import annotations

from sidecar.simulate import clients, words
from sidecar.simulate.actor import Actor, Caller
from sidecar.simulate.draws import Draws
from sidecar.simulate.service import Service


def health_check(seed: int, n: int, service: Service, start: float, end: float) -> Actor:
    """A probe at a fixed beat, from inside."""
    d = Draws(seed, 2, n)
    path, agent, every = (
        ("/healthz", "kube-probe/1.31", 10.0),
        ("/metrics", "Prometheus/2.54.1", 15.0),
        ("/readyz", "Envoy/HC", 5.0),
        ("/healthz", "Uptime-Monitor/1.4", 60.0),
    )[n % 4]
    caller = Caller(
        d,
        service,
        f"172.31.{n >> 8 & 255}.{n & 255}",
        (("Host", service.host), ("User-Agent", agent), ("Accept", "*/*")),
        "health_check",
    )
    t = start + d.between(0, every)
    while t < end:
        yield from caller.call(t, "GET", path, 200, 2)
        t += every + d.between(-0.01, 0.01)


def crawler(seed: int, n: int, service: Service, start: float, end: float) -> Actor:
    """A search engine: robots.txt, then page after page, politely, in bouts."""
    d = Draws(seed, 3, n)
    agent = d.pick(
        (
            "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)",
            "Mozilla/5.0 (compatible; bingbot/2.0; +http://www.bing.com/bingbot.htm)",
            "Mozilla/5.0 (compatible; YandexBot/3.0; +http://yandex.com/bots)",
            "DuckDuckBot/1.1; (+http://duckduckgo.com/duckduckbot.html)",
            "Mozilla/5.0 (compatible; AhrefsBot/7.0; +http://ahrefs.com/robot/)",
        )
    )
    caller = Caller(
        d,
        service,
        f"198.51.100.{n % 254 + 1}",
        (
            ("Host", service.host),
            ("User-Agent", agent),
            ("Accept", "text/html,application/xhtml+xml"),
            ("Accept-Encoding", "gzip, deflate, br"),
            ("From", "crawler@example.com"),
        ),
        "crawler",
    )
    t = start + d.wait(1800)
    pace = d.between(4, 20)
    while t < end:
        t, _ = yield from caller.call(t, "GET", "/robots.txt", 200, 4)
        if d.chance(0.3):
            t, _ = yield from caller.call(t + 1, "GET", "/sitemap.xml", 200, 20)
        for _ in range(d.integer(10, 80)):
            t += d.between(0.4, 1.6) * pace
            if t >= end:
                return
            item = d.integer(0, service.n_items - 1)
            luck = d.u()
            url = (
                f"/{service.items}/{service.item_id(item)}"
                if luck < 0.85
                else f"/{service.items}?page={d.integer(1, 60)}"
                if luck < 0.95
                else "/"
            )
            status = 200 if d.chance(0.88) else 304 if d.chance(0.5) else 301 if d.chance(0.5) else 404
            t, got = yield from caller.call(t, "GET", url, status, 25)
            if got >= 500:
                t += 120.0  # well-behaved crawlers back off
        t += d.wait(3600)


def integration(seed: int, n: int, service: Service, start: float, end: float) -> Actor:
    """A partner's system: asks for changes at a fixed interval, reads what is new, writes back; at
    night it exports everything that is its own."""
    d = Draws(seed, 4, n)
    key = clients.credential("key" if service.auth == "cookie" else service.auth, f"partner-{n}", d)
    caller = Caller(
        d,
        service,
        clients.office(4096 + n),
        (*clients.draw_device(d, service.host, "sdk").headers, key),
        "integration",
        0,
        3,
    )
    caller.principal = f"partner-{n}"
    every = d.pick((30.0, 60.0, 60.0, 300.0, 900.0))
    first = 10_000_000 + n * 1000  # the partner's own objects
    night = d.between(0.5, 4.5) * 3600.0
    t = start + d.between(0, every)
    exported = -1
    seen = 0
    while t < end:
        now = t
        s = service
        now, got = yield from caller.call(
            now, "GET", f"{s.prefix}/{s.objects}?updated_since={int(now - every)}&limit=100", 200, 30
        )
        if got == 200:
            for _ in range(d.count(every / 250.0, 12)):
                seen = (seen + 1) % 900
                now, got = yield from caller.call(
                    now + d.between(0.01, 0.2), "GET", s.object(first + seen), 200, 20
                )
                if d.chance(0.5):
                    now, _ = yield from caller.call(
                        now + 0.05,
                        "PATCH",
                        s.object(first + seen),
                        200 if d.chance(0.98) else 409,
                        40,
                        {
                            "status": d.pick(("packed", "sent", "delivered")),
                            "tracking": d.hex(12).upper(),
                            "remark": d.pick(words.SENTENCES) if d.chance(0.1) else "",
                        },
                    )
        day = int(t // 86400.0)
        if t % 86400.0 >= night and day != exported:
            exported = day
            for page in range(d.integer(5, 60)):
                now, got = yield from caller.call(
                    now + d.between(0.05, 0.4), "GET", s.page(s.objects, page, 100), 200, 80
                )
                if got >= 400:
                    break
        t = max(t + every + d.between(-0.02, 0.02) * every, now + 0.5)
