"""Units behind a number: 5 cm and 5 m are not the same answer; 5 cm and 0.05 m are, and so are 5 cm and 5."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_KNOWN: dict[str, tuple[str, str]] = {
    # spellings: dimension, size
    "mm millimeter millimetre": ("length", "1/1000"),
    "cm centimeter centimetre": ("length", "1/100"),
    "dm decimeter decimetre": ("length", "1/10"),
    "m meter metre": ("length", "1"),
    "km kilometer kilometre": ("length", "1000"),
    "in inch inche": ("length", "0.0254"),
    "ft foot feet": ("length", "0.3048"),
    "yd yard": ("length", "0.9144"),
    "mi mile": ("length", "1609.344"),
    "mg milligram": ("mass", "1/1000"),
    "g gram gm": ("mass", "1"),
    "kg kilogram": ("mass", "1000"),
    "lb pound": ("mass", "453.59237"),
    "oz ounce": ("mass", "28.349523125"),
    "ms millisecond": ("time", "1/1000"),
    "s sec second": ("time", "1"),
    "min minute": ("time", "60"),
    "h hr hour": ("time", "3600"),
    "day": ("time", "86400"),
    "week": ("time", "604800"),
    "ml milliliter millilitre": ("volume", "1/1000"),
    "l liter litre": ("volume", "1"),
    "dollar usd": ("money", "1"),
    "cent ¢": ("money", "1/100"),
    "euro eur €": ("euro", "1"),
    "£ gbp": ("sterling", "1"),
    "rupee rs ₹": ("rupee", "1"),
    "degree deg": ("degree", "1"),
    "radian rad": ("radian", "1"),
    "°c celsius": ("celsius", "1"),
    "°f fahrenheit": ("fahrenheit", "1"),
    "n newton": ("force", "1"),
    "j joule": ("energy", "1"),
    "kj kilojoule": ("energy", "1000"),
    "w watt": ("power", "1"),
    "kw kilowatt": ("power", "1000"),
    "v volt": ("voltage", "1"),
    "hz hertz": ("frequency", "1"),
}
_UNITS = {name: meaning for names, meaning in _KNOWN.items() for name in names.split()}
_COMPOUND = {"mph": "mi/h", "kmph": "km/h", "kph": "km/h", "kmh": "km/h"}
_BARE = "|".join(sorted((re.escape(u) for u in (*_UNITS, *_COMPOUND)), key=len, reverse=True))
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_POWER = r"(?:\s*\^\s*\{?\s*(?P<power>[234])\s*\}?)?"
_IN_TEXT = re.compile(
    r"(?P<body>.*[\w})\]%])\s*\\text\s*\{\s*(?P<unit>[^{}]*?)\s*\}" + _POWER + r"\s*$", re.DOTALL
)
_AFTER = re.compile(
    rf"(?P<body>.*[\d}})])(?:\s+|(?=[a-zA-Z]{{2}}))(?P<unit>(?:(?:square|cubic|sq|cu)\.?\s+)?(?:{_BARE})s?"
    rf"(?:\s*(?:/|per)\s*(?:{_BARE})s?)?)" + _POWER + r"\s*$",
    re.DOTALL | re.IGNORECASE,
)
_WORDS = re.compile(r"(?P<body>-?[\d.,/]+)\s+(?P<unit>[A-Za-z]{4,}(?:\s+[A-Za-z]{2,}){0,3})(?P<power>)\s*$")
_MONEY = re.compile(r"^(?P<sign>-?)\s*(?P<unit>\\?\$|€|£|₹)\s*(?P<body>\d.*)$", re.DOTALL)
_ANGLE = re.compile(
    r"(?P<body>.*\S)\s*\^\s*\{?\s*\\circ\s*\}?(?P<scale>\s*(?:\\text\s*\{)?\s*[CF]\s*\}?)?\s*$", re.DOTALL
)


@dataclass(frozen=True)
class Unit:
    """A unit, as far as it is known.

    Attributes:
        dimension: What it measures, such as "length^2"; None for a word of which nothing is known.
        size: In the first unit of its dimension.
    """

    dimension: str | None
    size: Fraction = Fraction(1)


def split_unit(text: str) -> tuple[str, Unit | None]:
    """A quantity without its unit, and that; None where there is none."""
    if money := _MONEY.match(text):
        body, currency = money["sign"] + money["body"], money["unit"]
        return split_unit(body)[0], Unit("money") if "$" in currency else _simple(currency)
    if angle := _ANGLE.match(text):
        scale = re.sub(r"[^CF]", "", (angle["scale"] or "").replace(r"\text", ""))
        return angle["body"], Unit({"C": "celsius", "F": "fahrenheit"}.get(scale, "degree"))
    found = _IN_TEXT.match(text) or _AFTER.match(text) or _WORDS.match(text)
    if found is None:
        return text, None
    unit = read_unit(found["unit"])
    if unit.dimension and found["power"]:
        power = int(found["power"])
        unit = Unit(f"{unit.dimension}^{power}", unit.size**power)
    return found["body"].strip(), unit


def read_unit(text: str) -> Unit:
    """The meaning of a unit."""
    text = _COMPOUND.get(text.strip().lower(), text.strip())
    top, _, bottom = re.sub(r"\bper\b", "/", text).partition("/")
    above = _simple(top)
    if not bottom:
        return above
    below = _simple(bottom)
    if above.dimension is None or below.dimension is None:
        return Unit(None)
    return Unit(f"{above.dimension}/{below.dimension}", above.size / below.size)


def _simple(text: str) -> Unit:
    words = text.strip().lower().replace(".", "").split()
    power = _POWERS.get(words[0], 1) if words else 1
    if power > 1:
        words = words[1:]
    name = " ".join(words)
    if raised := re.fullmatch(r"(\w+)\s*\^\s*\{?([23])\}?", name):
        name, power = raised[1], int(raised[2])
    for spelling in (name, name.removesuffix("s"), name.removesuffix("es")):
        if spelling in _UNITS:
            dimension, size = _UNITS[spelling]
            return Unit(dimension if power == 1 else f"{dimension}^{power}", Fraction(size) ** power)
    return Unit(None)
