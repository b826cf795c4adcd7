"""A small text generator: rules with alternatives, drawn at random."""
from __future__ import annotations

import random
import re
import string

_SLOT = re.compile(r"<<(\w+)>>")
_DEPTH_MAX = 12

_WORDS = (
    "account action alpha amount apple article author balance banner basket blue board book branch budget "
    "button camera campaign card cart category center chapter choice city class client cloud color comment "
    "company contact content copy corner country course credit customer daily data date deal delivery demo "
    "design detail device dinner doctor document driver early east editor effect email employee energy "
    "engine event example expert family feature field film filter final finance flight folder forest form "
    "forum friend garden gift global gold green group guest guide happy health history holiday home hotel "
    "house image index info invoice island item job journal key kitchen label language large letter level "
    "library light list local location logo lunch machine mail main manager market master media meeting "
    "member memory menu message method mobile model modern money month morning music name nature network "
    "news night note notice number object ocean office offer online open option orange order page panel "
    "paper park partner party pattern payment people phone photo picture place plan player point policy "
    "portal post price print privacy product profile project promo public quality quick radio random rate "
    "reader record red region report request result review river room route sale sample schedule school "
    "science score search season section sector service session shop show silver simple single size small "
    "social song source south space sport spring staff stage state station status store story street "
    "student studio style subject summer support survey system table target team ticket time title today "
    "topic total tour town track trade train travel tree trial update user value vendor video view village "
    "visit visitor voice wallet water weather web week white window winter wonder word work world writer "
    "year young zone"
)
WORDS = _WORDS.split()


class Grammar:
    """rules: name -> alternatives; `<<name>>` in an alternative is replaced by a draw from that rule.

    Built in: int, small, word, ident, hex, host, ip, rnd (random letters and digits).
    """

    def __init__(self, rules: dict[str, list[str]]) -> None:
        self.rules = rules
        for name, alternatives in rules.items():
            for text in alternatives:
                for slot in _SLOT.findall(text):
                    if slot not in rules and slot not in _BUILT_IN:
                        raise ValueError(f"rule {name!r} names {slot!r}, which is not defined")

    def sample(self, rng: random.Random, name: str, depth: int = 0) -> str:
        if name in self.rules:
            if depth > _DEPTH_MAX:
                return ""
            text = rng.choice(self.rules[name])
            return _SLOT.sub(lambda m: self.sample(rng, m.group(1), depth + 1), text)
        return _built_in(rng, name)


_BUILT_IN = {"int", "small", "word", "ident", "hex", "host", "ip", "rnd", "letter"}


def _built_in(rng: random.Random, name: str) -> str:
    match name:
        case "int":
            return str(rng.choice([rng.randrange(10), rng.randrange(1000), rng.randrange(10**7)]))
        case "small":
            return str(rng.randrange(1, 20))
        case "word":
            return rng.choice(WORDS)
        case "ident":
            return rng.choice([rng.choice(WORDS), f"{rng.choice(WORDS)}_{rng.choice(WORDS)}",
                               f"{rng.choice(WORDS)}{rng.randrange(100)}"])
        case "hex":
            return f"{rng.getrandbits(rng.choice([16, 32, 64])):x}"
        case "letter":
            return rng.choice(string.ascii_lowercase)
        case "ip":
            return ".".join(str(rng.randrange(1, 255)) for _ in range(4))
        case "host":
            top = rng.choice(["com", "net", "org", "io", "co", "example", "test", "xyz", "info", "dev"])
            return f"{rng.choice(WORDS)}{rng.choice(['', '-', '.'])}{rng.choice(WORDS)}.{top}"
        case _:
            n = rng.randrange(3, 12)
            return "".join(rng.choice(string.ascii_letters + string.digits) for _ in range(n))
