"""People: they come by day, log in (and mistype), look around, buy, write, and leave."""

from __future__ import annotations

import math
from urllib.parse import quote, urlencode

from sidecar.simulate import clients, words
from sidecar.simulate.actor import Actor, Caller, Step, Walk
from sidecar.simulate.draws import Draws
from sidecar.simulate.service import Service

DAY = 86400.0
# visits per hour of the day, relative; a table rather than a formula: real days have a lunch break
# fmt: off
AT_HOME = (.25, .12, .07, .05, .05, .1, .3, .6, .8, .85, .9, .95,
           1.05, 1., .95, .95, 1., 1.15, 1.4, 1.7, 1.9, 1.8, 1.3, .7)
AT_WORK = (.02, .01, .01, .01, .02, .05, .3, 1.1, 2., 2.4, 2.3, 2.,
           1.3, 1.7, 2.2, 2.1, 1.8, 1.2, .6, .25, .15, .1, .06, .04)
# fmt: on
WEEKEND_HOME, WEEKEND_WORK = 1.25, 0.12


def rhythm(at_work: bool, ts: float, zone_s: float) -> float:
    """Relative rate of visits at this time (mean about 1)."""
    local = (ts + zone_s) / 3600.0
    hour = local % 24.0
    table = AT_WORK if at_work else AT_HOME
    i = int(hour)
    rate = table[i] + (table[(i + 1) % 24] - table[i]) * (hour - i)
    if (int(local // 24.0) + 3) % 7 >= 5:  # 1970-01-01 was a Thursday; Monday is 0
        rate *= WEEKEND_WORK if at_work else WEEKEND_HOME
    return rate


def next_visit(d: Draws, at_work: bool, zone_s: float, ts: float, end: float, per_day: float) -> float:
    """Time of the next visit of a non-homogeneous Poisson process, by thinning; inf after the end."""
    most = 2.4 * WEEKEND_HOME
    mean = DAY / (per_day * most)
    while True:
        ts += d.wait(mean)
        if ts >= end:
            return math.inf
        if d.u() * most < rhythm(at_work, ts, zone_s):
            return ts


def person(seed: int, n: int, n_users: int, service: Service, start: float, end: float) -> Actor:
    """All visits of one user."""
    d = Draws(seed, 1, n)
    place = d.u()
    at_work = place < 0.25  # sits in an office, behind its one address
    device = clients.draw_device(d, service.host, None if not at_work else "web")
    zone_s = 3600.0 * d.pick((0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, -5))
    if at_work:
        zone_s = 3600.0  # the offices are near each other
    per_day = min(20.0, d.lognormal(2.2, 0.8))
    user = _User(d, service, n, device)
    t = start
    while (t := next_visit(d, at_work, zone_s, t, end, per_day)) < end:
        if at_work:
            user.address = clients.office(1 + n * 7 % max(1, round(n_users * 0.25 / 22)))
        elif device.kind == "mobile":
            user.address = clients.carrier(d.integer(0, max(1, n_users // 30)))
        elif n % 2:
            user.address = clients.home_v6(n, d)
        else:
            user.address = clients.home_v4(n)
        t = yield from user.visit(t, end)


class _User(Caller):
    __slots__ = ("assets", "base", "device", "mail", "n", "name", "own", "password", "ready")

    def __init__(self, d: Draws, service: Service, n: int, device: clients.Device) -> None:
        super().__init__(
            d, service, "", device.headers, f"user_{device.kind}", 0, 2 if device.kind != "web" else 1
        )
        self.n, self.device, self.base = n, device, device.headers
        self.name = f"{d.pick(words.FIRST_NAMES)} {d.pick(words.LAST_NAMES)}"
        compact = self.name.replace(" ", ".").replace("'", "")
        self.mail = f"{compact}{n}@{d.pick(words.MAIL_HOSTS)}"
        self.password = d.pick(words.NOUNS) + d.pick("!?#.-_") + d.hex(5)
        self.own = [n * 40 + i for i in range(d.integer(0, 9))]  # objects that are this user's
        self.ready = False  # the scripts are in the browser's cache

    # -- a visit -------------------------------------------------------------------------------

    def visit(self, t: float, end: float) -> Walk:
        d = self.d
        remembered = self.principal is not None and d.chance(0.75)
        if not remembered:
            self.principal, self.headers = None, self.base
        t = yield from self.open(t)
        wants_account = remembered or d.chance(0.6)
        actions = 1 + d.count(6.0 if self.device.kind == "web" else 4.0, 60)
        for i in range(actions):
            if t >= end:
                return t
            if wants_account and self.principal is None and i >= actions // 3:
                t = yield from self.login(t)
                if self.principal is None:
                    wants_account = False
            t = yield from self.act(t)
            t += min(600.0, d.lognormal(9.0, 1.0))
        if self.principal is not None and d.chance(0.12):
            t, _ = yield from self.call(t, "POST", self.service.prefix + "/logout", 204)
            self.principal, self.headers = None, self.base
        return t

    def open(self, t: float) -> Walk:
        """What a page or an app loads when it starts, many requests at almost the same time."""
        d, s = self.d, self.service
        if self.device.assets:
            t, _ = yield from self.call(t, "GET", "/", 200, 15)
            fresh = not self.ready or d.chance(0.1)
            for path in (
                f"/static/app.{s.asset_hash}.js",
                f"/static/app.{s.asset_hash}.css",
                "/static/logo.svg",
                "/static/fonts/text.woff2",
            ):
                yield from self.call(t + d.between(0.01, 0.15), "GET", path, 200 if fresh else 304, 4)
                t += 0.02
            self.ready = True
            if d.chance(0.15):
                yield from self.call(t, "GET", "/favicon.ico", 404 if s.salt % 2 else 200, 3)
        else:
            t, _ = yield from self.call(t, "GET", s.prefix + "/config?platform=app", 200, 12)
            if d.chance(0.4):
                events = [
                    {
                        "name": "app_open",
                        "ts": int(t * 1000) - d.integer(0, 9000),
                        "screen": d.pick(words.NOUNS),
                    }
                    for _ in range(d.integer(1, 6))
                ]
                yield from self.call(t + 0.3, "POST", s.prefix + "/events", 202, 8, {"events": events})
        if self.principal is not None:
            t, _ = yield from self.call(t + 0.05, "GET", s.prefix + "/users/me", 200, 14)
        return t + d.between(0.1, 0.6)

    def login(self, t: float) -> Walk:
        """With a slip of the finger now and then: mostly one, at times two or three."""
        d, s = self.d, self.service
        slips = 0 if d.chance(0.88) else 1 if d.chance(0.7) else 2 if d.chance(0.7) else 3
        for i in range(slips + 1):
            password = self.password
            if i < slips:
                at = d.integer(0, len(password) - 1)
                password = password[:at] + password[at + 1 :] if d.chance(0.5) else password.swapcase()
            wrong = i < slips
            fields = {
                s.user_field: self.mail if "mail" in s.user_field else self.mail.partition("@")[0],
                "password": password,
            }
            t, got = yield from post_login(self, t, fields, s.failed_login if wrong else 200)
            if got == 200:
                self.principal = f"user-{self.n}"
                self.headers = (*self.base, clients.credential(s.auth, self.principal, d))
                t, _ = yield from self.call(t + 0.1, "GET", s.prefix + "/users/me", 200, 14)
                return t
            if got >= 500:
                return t
            t += min(120.0, d.lognormal(7.0, 0.6))
            if slips == 3 and i == 2 and d.chance(0.5):
                t, _ = yield from self.call(
                    t, "POST", s.prefix + "/password/reset", 202, 60, {"email": self.mail}
                )
                return t + d.between(20, 90)
        return t

    def act(self, t: float) -> Walk:
        choice = self.d.u()
        known = self.principal is not None
        if choice < 0.30:
            return (yield from self.look(t))
        if choice < 0.50:
            return (yield from self.browse(t))
        if choice < 0.64:
            return (yield from self.search(t))
        if not known:
            return (yield from self.look(t))
        if choice < 0.74:
            return (yield from self.shop(t))
        if choice < 0.88:
            return (yield from self.own_things(t))
        if choice < 0.95:
            return (yield from self.profile(t))
        return (yield from self.write(t))

    # -- what people do ------------------------------------------------------------------------

    def look(self, t: float) -> Walk:
        d, s = self.d, self.service
        n = d.zipf(s.n_items)
        gone = d.chance(0.012)
        t, got = yield from self.call(t, "GET", s.item(n), 404 if gone else 200, 20)
        if got == 200:
            if d.chance(0.6):
                yield from self.call(t + 0.01, "GET", s.item(n) + "/reviews?limit=10", 200, 18)
            if d.chance(0.4):
                yield from self.call(t + 0.03, "GET", s.item(n) + "/related", 200, 30)
            if self.device.assets:
                for i in range(d.integer(1, 3)):
                    yield from self.call(
                        t + 0.05 + 0.01 * i,
                        "GET",
                        f"/static/img/{s.item_id(n)}-{i}.webp",
                        200 if d.chance(0.99) else 404,
                        6,
                    )
                t += 0.1
        return t

    def browse(self, t: float) -> Walk:
        d, s = self.d, self.service
        suffix = f"&sort={d.pick(('new', 'price', '-price', 'name'))}" if d.chance(0.5) else ""
        for page in range(1 + d.count(1.2, 12)):
            t, got = yield from self.call(t, "GET", s.page(s.items, page, 20) + suffix, 200, 35)
            if got != 200:
                break
            if s.details:
                for i in range(d.integer(8, 20)):
                    yield from self.call(t + 0.004 * i, "GET", s.item((page * 20 + i) % s.n_items), 200, 15)
                t += 0.08
            t += min(90.0, d.lognormal(5.0, 0.8))
        return t

    def search(self, t: float) -> Walk:
        d, s = self.d, self.service
        query = (
            d.pick(words.ODD_SEARCHES)
            if d.chance(0.08)
            else f"{d.pick(words.ADJECTIVES)} {d.pick(words.NOUNS)}"
            if d.chance(0.6)
            else d.pick(words.NOUNS)
        )
        if self.device.kind == "web":
            for length in range(3, len(query), d.integer(2, 4)):  # suggestions while typing
                yield from self.call(t, "GET", f"{s.prefix}/suggest?q={quote(query[:length])}", 200, 8)
                t += d.between(0.12, 0.5)
        t, _ = yield from self.call(
            t, "GET", f"{s.prefix}/search?" + urlencode({"q": query, "in": s.items}), 200, 70
        )
        return t

    def shop(self, t: float) -> Walk:
        d, s = self.d, self.service
        item = s.item_id(d.zipf(s.n_items))
        t, _ = yield from self.call(
            t,
            "POST",
            s.prefix + "/cart/items",
            201,
            40,
            {"item": item, "quantity": d.integer(1, 3), "note": ""},
        )
        if d.chance(0.25):
            t, _ = yield from self.call(
                t + d.between(2, 15),
                "PATCH",
                f"{s.prefix}/cart/items/{item}",
                200,
                30,
                {"quantity": d.integer(1, 5)},
            )
        if d.chance(0.2):
            t, _ = yield from self.call(
                t + d.between(2, 15), "DELETE", f"{s.prefix}/cart/items/{item}", 204, 25
            )
        elif d.chance(0.45):
            t, _ = yield from self.call(t + d.between(1, 4), "GET", s.prefix + "/cart", 200, 25)
            order = {
                "address": {
                    "name": self.name.title(),
                    "street": f"{d.pick(words.LAST_NAMES).title()} St. {d.integer(1, 200)}",
                    "city": d.pick(words.CITIES),
                    "zip": f"{d.integer(1000, 99999)}",
                },
                "payment": {"method": d.pick(("card", "invoice", "wallet")), "token": f"tok_{d.hex(24)}"},
                "comment": d.pick(words.SENTENCES) if d.chance(0.2) else None,
                "newsletter": d.chance(0.2),
            }
            t, got = yield from self.call(
                t + d.lognormal(30, 0.6),
                "POST",
                f"{s.prefix}/{s.objects}",
                201 if d.chance(0.97) else 422,
                120,
                order,
                extra=(("Idempotency-Key", d.hex(32)),),
            )
            if got == 201:
                self.own.append(self.n * 40 + len(self.own) % 40)
        return t

    def own_things(self, t: float) -> Walk:
        d, s = self.d, self.service
        t, got = yield from self.call(t, "GET", s.page(s.objects, 0, 20), 200, 30)
        if got == 200 and self.own:
            for _ in range(1 + d.count(0.8, 5)):
                t += d.lognormal(4.0, 0.7)
                n = d.pick(self.own)
                t, _ = yield from self.call(t, "GET", s.object(n), 200, 22)
                if d.chance(0.2):
                    t, _ = yield from self.call(t + 0.5, "GET", s.object(n) + "/receipt.pdf", 200, 90)
        return t

    def profile(self, t: float) -> Walk:
        d, s = self.d, self.service
        t, _ = yield from self.call(t, "GET", s.prefix + "/users/me", 200, 14)
        if d.chance(0.3):
            change = {
                "name": self.name.title(),
                "city": d.pick(words.CITIES),
                "phone": f"+49{d.integer(10**8, 10**9)}",
                "preferences": {"language": d.pick(("de", "en", "fr", "tr")), "mails": d.chance(0.5)},
            }
            t, _ = yield from self.call(
                t + d.lognormal(25, 0.5),
                "PUT",
                s.prefix + "/users/me",
                200 if d.chance(0.95) else 422,
                45,
                change,
            )
        elif d.chance(0.3):
            t, _ = yield from self.call(t + 1, "GET", s.prefix + "/notifications?unread=true", 200, 15)
        return t

    def write(self, t: float) -> Walk:
        d, s = self.d, self.service
        text = " ".join(d.pick(words.SENTENCES) for _ in range(d.integer(1, 4)))
        step: Step = self.call(
            t + d.lognormal(40, 0.6),
            "POST",
            s.item(d.zipf(s.n_items)) + "/reviews",
            201 if d.chance(0.97) else 422,
            50,
            {"rating": d.integer(1, 5), "title": d.pick(words.SENTENCES)[:40], "text": text},
        )
        t, _ = yield from step
        return t


def post_login(caller: Caller, t: float, fields: dict[str, str], status: int) -> Step:
    """The login request in the service's own style."""
    service = caller.service
    if service.login_form:
        return caller.call(t, "POST", service.login_path, status, 110, form=urlencode(fields))
    return caller.call(t, "POST", service.login_path, status, 110, fields)
