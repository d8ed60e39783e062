"""Units of answers: taken off a value, and compared, for "5 m" is not "5 cm"."""

from __future__ import annotations

import re
from typing import NamedTuple

_NAMES = {
    "mm": "millimeter millimeters millimetre millimetres",
    "cm": "centimeter centimeters centimetre centimetres",
    "dm": "decimeter decimeters decimetre decimetres",
    "m": "meter meters metre metres metros mètres metern",
    "km": "kilometer kilometers kilometre kilometres kilómetros",
    "nm": "nanometer nanometers nanometre nanometres",
    "µm": "um micrometer micrometers micrometre micrometres micron microns \\mum",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards",
    "mi": "mile miles",
    "mg": "milligram milligrams",
    "g": "gram grams gramm gramos",
    "kg": "kilogram kilograms kilo kilos kilogramm",
    "lb": "lbs pound pounds",
    "oz": "ounce ounces",
    "t": "ton tons tonne tonnes",
    "ml": "mL milliliter milliliters millilitre millilitres",
    "l": "L liter liters litre litres litros",
    "gal": "gallon gallons",
    "qt": "quart quarts",
    "pt": "pint pints",
    "cup": "cups",
    "ms": "millisecond milliseconds",
    "s": "sec secs second seconds segundos sekunden secondes",
    "min": "mins minute minutes minutos minuten",
    "h": "hr hrs hour hours horas stunden heures",
    "day": "days d días tage jours",
    "week": "weeks",
    "month": "months",
    "year": "years yr yrs años jahre",
    "mph": "",
    "kph": "kmh kmph",
    "N": "newton newtons",
    "kN": "kilonewton kilonewtons",
    "J": "joule joules",
    "kJ": "kilojoule kilojoules",
    "MJ": "megajoule megajoules",
    "eV": "electronvolt electronvolts",
    "keV": "",
    "MeV": "",
    "GeV": "",
    "cal": "calorie calories",
    "kcal": "kilocalorie kilocalories",
    "W": "watt watts",
    "kW": "kilowatt kilowatts",
    "MW": "megawatt megawatts",
    "kWh": "kilowatthours",
    "V": "volt volts",
    "mV": "millivolt millivolts",
    "kV": "kilovolt kilovolts",
    "A": "amp amps ampere amperes",
    "mA": "milliamp milliamps",
    "Hz": "hertz",
    "kHz": "kilohertz",
    "MHz": "megahertz",
    "GHz": "gigahertz",
    "Pa": "pascal pascals",
    "kPa": "kilopascal kilopascals",
    "MPa": "megapascal megapascals",
    "atm": "atmosphere atmospheres",
    "bar": "bars",
    "K": "kelvin kelvins",
    "C": "coulomb coulombs",
    "T": "tesla teslas",
    "mol": "mole moles mols",
    "mmol": "millimole millimoles",
    "M": "molar",
    "\\Omega": "ohm ohms",
    "rad": "radian radians",
    "^\\circ": "degree degrees deg grad",
    "^\\circC": "celsius",
    "^\\circF": "fahrenheit",
    "$": "dollar dollars usd USD bucks",
    "cent": "cents ¢ pennies penny",
    "€": "euro euros eur EUR",
    "£": "gbp GBP sterling",
    "¥": "yen yuan jpy JPY",
    "₹": "rupee rupees inr INR",
    "%": "percent percentage pct per\u00a0cent prozent",
}
_CANONICAL = {name: unit for unit, names in _NAMES.items() for name in (unit, *names.split())}
_BARE = frozenset("mgshtlNJWVAKCLTdM")
"""Letters that may also be variables: a unit only after a space, where the answer is a number."""

_NOTHING = frozenset((
    "unit", "units", "square", "sq", "cubic", "total", "in", "of", "the", "points", "point",
))  # fmt: skip
"""Words that name no unit."""

_DOUBTFUL = frozenset((
    "or", "and", "to", "not", "no", "if", "when", "unless", "otherwise", "thousand",
    "million", "billion", "trillion", "hundred", "dozen", "least", "most", "more", "less",
    "than", "between", "half", "double", "twice", "times", "oder", "und", "ou", "et", "o",
    "y", "either", "neither", "versus", "vs", "maybe", "perhaps", "only", "after", "before",
    "plus", "minus",
))  # fmt: skip
"""Words after which a number is not the answer alone."""


class Unit(NamedTuple):
    """What stands after a number, or before it."""

    name: str | None
    """In one spelling; None where the words name none ("units"), "?" where they are not known."""
    doubtful: bool
    """Whether the words change the number: "5 thousand", "5 or 6"."""


_CURRENCY = re.compile(r"^([+-]?)\s?([$€£¥₹])\s?(?=[\d.+-])|(?<=[\d.])\s?([$€£¥₹])$")
_DEGREES = re.compile(r"\s?\^\s?\{?\s?\\circ\s?\}?\s?([CFcf]?)$")
_PERCENT = re.compile(r"(?i)(?<=[\d}\s])(?:per\s?cent|percentage|pct|prozent)$")
_ORDINAL = re.compile(r"(?<=\d)\s?(?:\^\s?\{?\s?)?(?:st|nd|rd|th)\s?\}?$")
_POWER = r"(?:\s?\^\s?\{?-?\d\}?)?"
_WORDS = re.compile(
    rf"(?P<gap>\s?)(?P<words>(?:\\Omega|\\mu\s?m|[^\W\d_]+){_POWER}"
    rf"(?:(?:\s?(?:/|\\cdot|\*|·)\s?|[\s-]+)(?:\\Omega|[^\W\d_]+){_POWER})*)$"
)
_REMARK = re.compile(r"\s\([^()]*[a-zA-Z]{3}[^()]*\)$")
_ENDS_NUMBER = re.compile(r"[\d.})\]!]$")


def split_unit(value: str) -> tuple[str, Unit | None]:
    """Split a value, cleaned and without \\text, into what is measured and its unit.

    >>> split_unit("15 square inches"), split_unit("$36")
    (('15', Unit(name='in^2', doubtful=False)), ('36', Unit(name='$', doubtful=False)))
    >>> split_unit("2x"), split_unit("5 thousand")[1]
    (('2x', None), Unit(name='?', doubtful=True))
    """
    value = _REMARK.sub("", " ".join(value.split())).strip()
    value = _ORDINAL.sub("", value)
    if money := _CURRENCY.search(value):
        sign, mark = money[1] or "", money[2] or money[3]
        rest = (sign + value[money.end() :]) if money[2] else value[: money.start()]
        core, unit = split_unit(rest) if rest != value else (rest, None)
        return core, _both(mark, unit)
    if degrees := _DEGREES.search(value):
        return value[: degrees.start()], Unit("^\\circ" + degrees[1].upper(), False)
    value = _PERCENT.sub("%", value).replace(" %", "%")
    if value.endswith("%"):
        return value, None
    found = _find_words(value)
    if found is None:
        return value, None
    return value[: found.start()].strip(), _unit(found["words"])


def _both(mark: str, unit: Unit | None) -> Unit:
    if unit is None or (unit.name in (None, mark) and not unit.doubtful):
        return Unit(mark, False)
    return Unit(f"{mark} {unit.name}", unit.doubtful)


def _find_words(value: str) -> re.Match[str] | None:
    """Find the words that end a value, if they are no part of its formula."""
    found = _WORDS.search(value, max(0, len(value) - 200))
    if found is None or not _ENDS_NUMBER.search(value[: found.start()]):
        return None
    first = re.match(r"\\?[^\W\d_]+", found["words"])
    name = first[0] if first else ""
    if len(found["words"]) == 1 and not (
        found["gap"] and name in _BARE and _is_digits(value[: found.start()])
    ):
        return None
    if name not in _CANONICAL and (not found["gap"] or len(name) < 3) and name not in _DOUBTFUL:
        return None
    return found


def _is_digits(value: str) -> bool:
    return re.fullmatch(r"-?[\d.]+", value.strip()) is not None


def _unit(text: str) -> Unit:
    parts = re.findall(r"\\?[^\W\d_]+|\^\s?\{?-?\d\}?|/|\\cdot|\*", text)
    doubtful = any(part.casefold() in _DOUBTFUL for part in parts)
    names: list[str] = []
    power = ""
    known = True
    for part in parts:
        lowered = part.casefold()
        if lowered in ("square", "sq"):
            power = "^2"
        elif lowered == "cubic":
            power = "^3"
        elif lowered in ("squared", "cubed") and names:
            names[-1] += "^2" if lowered == "squared" else "^3"
        elif part.startswith("^") and names:
            names[-1] += "^" + re.sub(r"[^\d-]", "", part)
        elif lowered in ("/", "per", "an", "each") or part in ("\\cdot", "*"):
            names.append("/" if lowered in ("/", "per", "an", "each") else "")
        elif unit := _CANONICAL.get(part) or _CANONICAL.get(lowered):
            names.append(unit + power)
            power = ""
        elif lowered not in _NOTHING:
            known = False
    name = "".join(names)
    name = {"mi/h": "mph", "km/h": "kph"}.get(name, name)
    return Unit((name or None) if known else "?", doubtful)
