"""How answers are written: one spelling for numbers, LaTeX, units and words.

Two values are the same answer where their `key` is equal; whether two formulas are equal in meaning
is decided by math-verify, in the sandbox, which is given what `formula` makes of them. All patterns
are linear, or run on at most `LONGEST` characters.
"""

from __future__ import annotations

import re
from fractions import Fraction

from dsjax.rewards.units import split_unit

LONGEST = 2000

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−‐‑‒–—﹣－", "-"),
        **dict.fromkeys("\u2009\u202f\u00a0\u2007\u2008\u200a\u3000", "\u2009"),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
        "×": r" \times ",
        "·": r" \cdot ",
        "⋅": r" \cdot ",
        "÷": r" \div ",
        "π": r" \pi ",
        "∞": r" \infty ",
        "∪": r" \cup ",
        "∩": r" \cap ",
        "∈": r" \in ",
        "∅": r" \emptyset ",
        "≤": r" \le ",
        "≥": r" \ge ",
        "≈": r" \approx ",
        "±": r" \pm ",
        "°": r"^\circ",
        "²": "^2",
        "³": "^3",
        "½": r"\frac{1}{2}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "＄": "$",
        "％": "%",
        "，": ",",
        "（": "(",
        "）": ")",
    }
)
_ROOT = re.compile(r"√\s?(?:\(([^()]*)\)|\{([^{}]*)\}|(\w+))")
_COMMANDS = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|bigg?[lr]?|Bigg?[lr]?|limits|boldsymbol)(?![a-zA-Z])"
)
_FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_SHORT_FRACTION = re.compile(
    r"\\frac\s{0,3}(?:(\d)\s{0,3}(\d)|\{(\w+)\}\s{0,3}(\d)|(\d)\s{0,3}\{(\w+)\})"
)
_NESTED_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{([^{}]*)\}")
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|sc|normal|up|sl|md)?|mbox|hbox|math(?:bf|rm|it|sf|tt|bb)|emph|bold|operatorname|rm|bf|it)"
    r"\s{0,3}\{([^{}]*)\}"
)
_SPACE = re.compile(
    r"(?<!\\)\\(?:[,;:! ]|quad(?![a-zA-Z])|qquad(?![a-zA-Z])|space(?![a-zA-Z]))|~|\u2009"
)
_THOUSANDS = re.compile(
    r"(?<![\d.,}\w])(\d{1,3})"
    r"((?:(?:\{,\}|,|\\,|\\!|,\s?\\!|\\ |\u2009| (?=\d{3}(?!\d)))\s?\d{3})+)(?![\d])"
)
_LISTED = re.compile(r",\s+-?\d|[(\[]|\\\{")
"""In lists, tuples and sets a comma separates members."""


def clean(value: str) -> str:
    """Write a value with ASCII signs, without delimiters, sizes, thousands separators and spaces.

    >>> clean(r"$\\dfrac12$."), clean("−10\\u202f080"), clean(r"\\$32,\\!348")
    ('\\\\frac{1}{2}', '-10080', '$32348')
    """
    value = value[:LONGEST].translate(_CHARACTERS).replace("\\$", "$").replace("\\%", "%")
    value = _strip_delimiters(value)
    value = re.sub(r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi ", value)
    value = re.sub(r"(?<![\\a-zA-Z])sqrt(?![a-zA-Z])", "√", value)
    value = _ROOT.sub(lambda m: f"\\sqrt{{{m[1] or m[2] or m[3]}}}", value)
    value = _COMMANDS.sub("", value)
    value = _FRACTION.sub(r"\\frac", value)
    value = _SHORT_FRACTION.sub(
        lambda m: f"\\frac{{{m[1] or m[3] or m[5]}}}{{{m[2] or m[4] or m[6]}}}", value
    )
    value = _NESTED_BOX.sub(r"\1", value)
    listed = _LISTED.search(value) is not None
    value = _THOUSANDS.sub(lambda m: m[0] if listed and "," in m[2] else _join_digits(m), value)
    value = _SPACE.sub(" ", value)
    return _PUNCTUATION.sub("", " ".join(value.split())).strip()


_PUNCTUATION = re.compile(r"(?<!\\)[.,;:]{1,3}$")


def _join_digits(match: re.Match[str]) -> str:
    return match[1] + re.sub(r"\D", "", match[2])


def _strip_delimiters(value: str) -> str:
    value = value.strip()
    for _ in range(3):
        stripped = _PUNCTUATION.sub("", value).strip().strip("*`").strip()
        for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
            inside = stripped[len(opening) : -len(closing)]
            if (
                len(stripped) > 2 * len(opening)
                and stripped.startswith(opening)
                and stripped.endswith(closing)
                and closing not in inside
            ):
                stripped = inside.strip()
        if stripped == value:
            break
        value = stripped
    return value


def unwrap_text(value: str) -> str:
    """Replace \\text{...}, \\mathbf{...} and the like by what they hold.

    >>> unwrap_text(r"\\textbf{(\\text{B})}")
    '(B)'
    """
    for _ in range(4):
        value, count = _TEXT.subn(r"\1", value)
        if not count:
            break
    return value


# ---------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------

_ASSIGNED = re.compile(
    r"^(?!\\pi)\\?[a-zA-Z]{1,7}(?:_\{?\w{1,5}\}?)?\s*(?:\\approx|\\in(?![a-zA-Z])|:)\s*"
)
_NUMBER = re.compile(
    r"""(?x) (?P<sign>[+-]?)\s?
    (?: (?P<units>\d+)\s(?P<part>\d+)\s?/\s?(?P<of>\d+)
      | (?P<whole>\d+)?\s? \\frac\{\s?(?P<upsign>-?)(?P<up>\d+)\s?\}\{\s?(?P<down>\d+)\s?\}
      | (?P<digits>\d+(?:\.\d*)?|\.\d+)
        (?: \s?/\s?(?P<over>\d+(?:\.\d+)?)
          | \s?(?:\\times|\\cdot|\*|x)\s?10\s?\^\s?\{?\s?(?P<exponent>[+-]?\d{1,3})\s?\}?
          | [eE](?P<e>[+-]?\d{1,3})
          | \s?\^\s?\{?\s?(?P<power>-?\d{1,3})\s?\}? )?
    )"""
)


_NAMED = re.compile(
    r"\\?[a-zA-Z]+(?:_\{?\w{1,9}\}?|'{1,3})?(?:\([^()]{1,20}\))?|\\[a-zA-Z]+|[-+*/\s{}|()\[\]]"
)
"""Parts of what a value is assigned to: "m + n", "f(2)", "\\\\angle ABC"; no number."""

_CALCULATED = re.compile(
    r"(?:[\d\s.,!%*/^(){}+-]|\\(?:frac|cdot|times|div|sqrt|binom|pi|circ|ln|log|sin|cos|tan)(?![a-zA-Z]))+"
)
"""A side of an equation without variables: "110 + 3"."""

_REPEATING = re.compile(
    r"(?P<sign>-?)(?P<whole>\d*)\.(?P<once>\d*)\\(?:overline|bar)\s?\{(?P<cycle>\d+)\}"
)

_LONGEST_NUMBER = 400
"""Characters of a number: with its powers it stays below Python's limit of 4,300 digits."""


def number(value: str) -> Fraction | None:
    """Return the rational number that a cleaned value without a unit writes, if it does.

    >>> [str(number(v)) for v in (r"4\\frac{2}{3}", "-3/4", r"1.5 \\times 10^{3}", "2^{-6}", "20%")]
    ['14/3', '-3/4', '1500', '1/64', '1/5']
    """
    value = value.strip()
    while len(value) > 2 and (value[0], value[-1]) in (("(", ")"), ("{", "}")):
        value = value[1:-1].strip()
    if len(value) > _LONGEST_NUMBER:
        return None
    if repeating := _REPEATING.fullmatch(value):
        return _repeating(*repeating.group("sign", "whole", "once", "cycle"))
    percent = value.endswith("%")
    match = _NUMBER.fullmatch(value.rstrip("% "))
    if match is None:
        return None
    if match["power"] and len(match["digits"]) * abs(int(match["power"])) > 1000:
        return None
    try:
        found = _evaluate(match)
    except ZeroDivisionError:
        return None
    found = -found if match["sign"] == "-" else found
    return found / 100 if percent else found


def _repeating(sign: str, whole: str, once: str, cycle: str) -> Fraction:
    digits = int(whole + once + cycle) - int((whole + once) or "0")
    found = Fraction(digits, (10 ** len(cycle) - 1) * 10 ** len(once))
    return -found if sign else found


def _evaluate(match: re.Match[str]) -> Fraction:
    if match["units"]:
        return int(match["units"]) + Fraction(int(match["part"]), int(match["of"]))
    if match["up"]:
        part = Fraction(int(match["up"]), int(match["down"]))
        if match["upsign"]:
            part = -part
        return int(match["whole"]) + part if match["whole"] else part
    found = Fraction(match["digits"].rstrip(".") if match["digits"] != "." else "0")
    if match["over"]:
        return found / Fraction(match["over"])
    if ten := match["exponent"] or match["e"]:
        return found * Fraction(10) ** int(ten)
    return found ** int(match["power"]) if match["power"] else found


def spell(value: Fraction) -> str:
    """Spell a number: an integer, a decimal that ends, or a fraction.

    >>> spell(Fraction(-7, 2)), spell(Fraction(1, 3)), spell(Fraction(1024))
    ('-3.5', '1/3', '1024')
    """
    twos = fives = 0
    rest = value.denominator
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1 or (digits := max(twos, fives)) > 300:
        return f"{value.numerator}/{value.denominator}"
    scaled = str(abs(value.numerator) * 10**digits // value.denominator).rjust(digits + 1, "0")
    sign = "-" if value < 0 else ""
    return sign + (f"{scaled[:-digits]}.{scaled[-digits:]}" if digits else scaled)


def numeric(value: str) -> Fraction | None:
    """Return the number of a value as a model writes it: assigned, with a unit, approximated.

    >>> [str(numeric(v)) for v in ("x = 7", "12 apples", r"\\$1{,}500", r"\\frac37 \\approx 0.43")]
    ['7', '12', '1500', '3/7']
    """
    core, unit = split_unit(unwrap_text(strip_assignment(clean(value))))
    return None if unit is not None and unit.doubtful else number(core)


def strip_assignment(value: str) -> str:
    """Drop "x =" before a value, and what an exact value is said to be approximately.

    >>> strip_assignment("x = 7"), strip_assignment("m + n = 110 + 3 = 113")
    ('7', '113')
    >>> strip_assignment("x + 1 = 5"), strip_assignment(r"\\pi \\approx 3.14")
    ('x + 1 = 5', '\\\\pi')
    """
    sides = value.split("=")
    if len(sides) > 1 and "," not in value and sides[-1].strip():
        named = _NAMED.sub("", sides[0]) == ""
        if all(map(_CALCULATED.fullmatch, sides[named:-1])):
            value = sides[-1].strip()
    elif assigned := _ASSIGNED.match(value):
        value = value[assigned.end() :]
    exact, approximately, rest = value.partition(r"\approx")
    return (exact.strip() or rest.strip()) if approximately else value


# ---------------------------------------------------------------------------------------------
# Words and formulas
# ---------------------------------------------------------------------------------------------

_QUOTES = str.maketrans({**dict.fromkeys('“”„"`*', ""), "’": "'", "_": " "})


def words(value: str) -> str | None:
    """Return a value as words in lower case, without quotes, formatting and article.

    >>> words(r"\\text{The surgeon}"), words(r"\\text{``red''}."), words(r"\\text{(E)}")
    ('surgeon', 'red', 'e')
    """
    plain = re.sub(r"(?<!\w)'+|'+(?!\w)", "", unwrap_text(clean(value)).translate(_QUOTES))
    plain = " ".join(re.sub(r"[{}$]", "", plain).casefold().split()).strip(" .,;:!?")
    if re.fullmatch(r"\([^()]*\)", plain):
        plain = plain[1:-1]
    plain = re.sub(r"^(?:the|an?|his|her|its)\s(?=\w{2})", "", plain)
    return plain or None


def is_words(value: str) -> bool:
    """Whether an expected answer is words, and no formula.

    >>> is_words(r"\\text{Evelyn}"), is_words("Paris"), is_words(r"5\\text{ cm}"), is_words("ab")
    (True, True, False, False)
    """
    cleaned = clean(value)
    outside = _TEXT.sub("", cleaned).strip()
    if outside != cleaned and not outside:
        return numeric(value) is None
    plain = unwrap_text(cleaned)
    return re.fullmatch(r"[^\W\d_][^\W\d_'’.-]{2,}(?:[ -][^\W\d_'’.-]+)*", plain) is not None


def formula(value: str) -> str:
    """Return a value as LaTeX in which spaces and ways to set the same do not count.

    >>> formula(r" \\dfrac{1}{2} ") == formula(r"\\frac12")
    True
    """
    return re.sub(r"\s+", "", unwrap_text(strip_assignment(clean(value)))).rstrip(".")


def key(value: str) -> str:
    """Return the same key for values that are plainly the same answer."""
    found = numeric(value)
    if found is not None:
        return spell(found)
    core, _ = split_unit(unwrap_text(strip_assignment(clean(value))))
    return formula(core).casefold() or formula(value).casefold()
