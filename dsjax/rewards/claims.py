"""Claims: the places at which a text says what its answer is, and which of them counts.

A claim is a `\\boxed{}`, or a statement such as "The answer is 5" or "**Answer:** (B)". Claims that
the text itself rejects do not count ("not \\boxed{5}", "a common mistake is \\boxed{6}", "if n were
odd, the answer would be 7"), nor do those before a correction ("Wait, no: ..."). Of the others the
most explicit count: a final answer before an answer, an answer before a conclusion ("So ..."), a
conclusion before a mere box. If these differ there is no answer: a reward that took one of them
would teach a model to hedge. Of mere boxes in several paragraphs the last one counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from dsjax.rewards.outline import BOX, LONGEST, Outline

_PARAGRAPH = re.compile(r"\n[ \t]{0,9}\n")
_BOXED = 1
"""The strength of a box that no word calls the answer."""
_MOST_CLAIMS = 200
"""Only the last claims of a text are looked at."""


class Claim(NamedTuple):
    """One place at which a text says what its answer is."""

    begin: int
    end: int
    value: str
    """As it is written; empty where nothing can be read."""
    strength: int
    """0: under a condition; 1: a box; 2: a conclusion; 3: an answer; 4: a final answer."""
    rejected: bool
    """The text says that it is not the answer, or only might be."""
    alternative: bool
    """It is offered in addition to another one: "Alternatively, ..."."""


# ---------------------------------------------------------------------------------------------
# Words around a claim
# ---------------------------------------------------------------------------------------------

ANSWER = (
    r"\b(?:answers?|respuesta|réponse|antwort|risposta|resposta|odpowiedź|ответ|jawaban|cevap)\b"
    r"|答案|回答|答え|정답"
)
_STATED = re.compile(
    rf"(?i)(?P<final>\b(?:final|endgültige|finale?)\s{{1,3}}|最终)?(?:{ANSWER})"
    r"(?P<gap>[^\n.:：=?!;\ue000\ue001]{0,40}?)"
    r"(?P<verb>\b(?:is|are|be|equals|es|est|ist|lautet|é|è|был|это)\b|[:：=]|是|为|為)"
    r"|(?m:^)[ \t]{0,3}####(?!#)(?P<hashes>)"
)
"""The answer is 5; **Answer:** 5; Answer = 5; 答案是 5; #### 5, as GSM8K writes it."""

_HEADING = re.compile(
    rf"(?i)^\W{{0,9}}(?P<final>final|最终)?\s{{0,3}}(?:the\s)?(?:{ANSWER})\W{{0,9}}$"
)
_SENTENCE_END = re.compile(r"[.!?](?=[\s\"')\]]|$)|[。！？；;\n]")
_CLAUSE = re.compile(r"[,;:，；：—]|\s[-–]\s")

_CONCLUSION = re.compile(
    r"(?i)\b(?:so|thus|hence|therefore|finally|consequently|overall|in total|altogether|"
    r"we conclude|conclusion|correct|must be)\b|所以|因此|故"
)
_NOT_BEFORE = re.compile(
    r"(?i)(?:\bnot|n['’]t|\bnever|\bcannot|\bwithout|\binstead\s+of|\brather\s+than|\bneither|\bnor|"
    r"\bexclud\w+|\brul\w+ out|\breject\w*|\bdiscard\w*|\bnicht|\bno\s+es|不是|而非)"
    r"(?:\s+(?:be|the|is|simply|just|answer|option|choice|equal|to|as|a|an|get|being)){0,3}[\s(\[*]{0,4}$"
)
_MISTAKEN = re.compile(
    r"(?i)\b(?:mistakes?|mistaken(?:ly)?|errors?|erroneous(?:ly)?|wrong(?:ly)?|incorrect(?:ly)?|"
    r"slip|distractors?|easy\s+to|tempt\w+|falsch|incorrecta?|trap|pitfall|"
    r"(?:initially|originally|earlier|previously|at\s+first|first)\s+(?:i|we)|"
    r"(?:i|we)\s+(?:had\s+)?(?:first|initially|originally|earlier|previously)|"
    r"(?:first|initial|earlier|previous|naive)\s+(?:guess|attempt|answer|thought|try|result))\b"
    r"|错误"
)
_SUPPOSED = re.compile(r"(?i)\bwould\b|\bwere\b|\bhad\b|\bsuppose\b")
_CONDITION = re.compile(
    r"(?i)\b(?:if|without|with|were|had|otherwise|unless|when|instead|for|suppose|mistake|then)\b"
)
_IF = re.compile(
    r"(?i)^\W{0,9}(?:(?:and|but|or|so|note that|only)\s+)?(?:if|unless|when|assuming|provided)\b"
)
_OTHERS_SAY = re.compile(
    r"(?i)\b(?:many|some|others|one|someone|students|people)\s+"
    r"(?:would|might|could|may|say|think|answer|get|believe|choose)\b"
)
_TENTATIVE = re.compile(
    r"(?i)\b(?:could|might|may|can)\b(?!\s+not)|\b(?:maybe|perhaps|possibly|either|guess|unsure|"
    r"not\s+sure)\b|可能|也许"
)
_ALTERNATIVE = re.compile(
    r"(?i)\b(?:alternative(?:ly)?|otherwise|or\s+else|or\s+(?:maybe|perhaps|possibly|even|it)|"
    r"another\s+(?:possib\w+|answer|option|solution|value)|also)\b|(?:^|[\s(])or\s*$|或者"
)
_REJECTED_AFTER = re.compile(
    r"(?i)^[\s*)\]]{0,4}(?:[,(]\s{0,3})?(?:(?:which|that|this|but|it|and|while|because)\s+){0,3}"
    r"(?:\?|(?:is|was|are|were|seems?|looks?|can|does|do|did|has|had)\s{0,3}"
    r"(?:n['’]t|not|cannot|never|clearly\s+not|also\s+not)\b(?!\s+(?:only|just))|"
    r"(?:is|was|are|were|would\s+be|seems?|looks?|being)\s+"
    r"(?:\w+\s+){0,2}(?:wrong|incorrect|false|mistaken|invalid|impossible|ruled|rejected|excluded|"
    r"mistakes?|slip|errors?|distractor|tempting|trap|falsch|what\s+one)\b|"
    r"(?:fails|violates|contradicts|misses|overcounts|undercounts|ignores)\b|是错|不对)"
)
_BUT_AFTER = re.compile(
    r"(?i)^[^.\n]{0,60}?\b(?:but|however)\b[^.\n]{0,60}?\b(?:wrong|incorrect|mistake|slip|error|miss\w*|"
    r"forg[eo]t\w*|overlook\w*|(?:not|n['’]t)\s+(?:quite\s+)?(?:right|correct|it|true|so)|fail\w*)\b"
)
_CORRECTION = re.compile(
    r"(?i)\bwait\b|\bcorrect(?:ion|ed|ing)\b|\bactually\b|\bon\s+(?:reflection|second\s+thoughts?)\b|"
    r"\bno[,:.!]|\bno\s+wait\b|\bsorry\b|\bmy\s+mistake\b|\b(?:was|is|were)\s+(?:a\s+)?(?:wrong|mistake|"
    r"slip|mistaken|incorrect|an?\s+error)\b|\bi\s+made\b|\bi\s+(?:mis|over|under|forgot)\w*|"
    r"\bre-?(?:check|consider|think|count|calculat|comput|examin)\w*|\bhmm\b|\bhold\s+on\b|\bhowever\b|"
    r"\binstead\b|\bscratch\s+that\b|更正|等等|不对"
)


_RETRACTED = re.compile(
    r"(?i)\bwait\b[,.:!]|\bcorrection:|\bscratch\s+that\b|\bmy\s+mistake\b|更正"
)


class Context(NamedTuple):
    """The words around a claim, each side at most a few hundred characters."""

    sentence: str
    """From the sentence's beginning to the claim."""
    clause: str
    """The last clause of it."""
    after: str
    """What follows the claim, to the end of its sentence."""


def context(text: str, begin: int, end: int) -> Context:
    """Look around a claim in an outline's text."""
    before = text[max(0, begin - 300) : begin]
    ends = [match.end() for match in _SENTENCE_END.finditer(before)]
    sentence = before[ends[-1] :] if ends else before
    clauses = _CLAUSE.split(sentence)
    clause = clauses[-1]
    if re.search(r"[:：][\s*_$\"'(]{0,9}$", sentence) and len(clauses) > 1:  # "the answer is: 5"
        clause = clauses[-2] + " "
    after = text[end : end + 200]
    stop = _SENTENCE_END.search(after)
    return Context(sentence, clause, after[: stop.end()] if stop else after)


def is_rejected(around: Context, *, alternative: bool = False) -> bool:
    """Whether the text calls a claim wrong, hypothetical or a mere possibility.

    A possibility that is an `alternative` ("or maybe 6") stands: the text then claims both.
    """
    clause = around.clause
    return bool(
        _NOT_BEFORE.search(clause)
        or _MISTAKEN.search(clause)
        or is_hypothetical(around)
        or (not alternative and _TENTATIVE.search(clause))
        or _REJECTED_AFTER.search(around.after)
        or re.match(r"(?i)^\W{0,3}(?:if|unless|when|provided)\b", around.after)
        or _BUT_AFTER.search(around.after)
    )


def is_hypothetical(around: Context) -> bool:
    """Whether a claim holds under a condition only, or is what others say."""
    supposed = _SUPPOSED.search(around.clause) and (
        _CONDITION.search(around.sentence) or _CONDITION.search(around.after)
    )
    return bool(supposed or _OTHERS_SAY.search(around.clause))


def is_corrected(between: str) -> bool:
    """Whether the text between two claims takes back the first."""
    return bool(_CORRECTION.search(between))


# ---------------------------------------------------------------------------------------------
# Claims
# ---------------------------------------------------------------------------------------------

_JOINED = re.compile(
    r"(?:[\s,;&$、]|\\q?quad|\\[,;:! ]|\\text\{|\}|\b(?:and|or|und|oder|et|ou|y|o|e)\b|和|或)*"
    r"(?:[a-zA-Z](?:_?\{?\w\}?)?\s{0,3}=\s*)?"
)
_CHAINED = re.compile(r"\s*(?:=|\\approx|≈|\\equiv)\s*")
_REMARK = re.compile(
    r"(?i)\s\((?!\w\))|,?\s(?:because|since|which|where|but|whereas|while|so\s+that|rather\s+than|instead\s+of)\b|"
    r"(?<=[\d\ue000\ue001%]):\s|,\s(?:not|who|whose|when|the|an?|as|so|i\.e|that\s+is|rounded|and\s+not|denn|weil|car|puisque|porque|ya\s+que)\b|"
    r"\sas\s+(?:required|expected|desired|claimed)|\s[—–]\s|，|（|\s(?:and|but)\s+not\b|,\s+(?:I|we)\b"
)
_INTRODUCTION = re.compile(
    r"(?i)^(?:\s|[:：*_]|(?:therefore|thus|hence|simply|just|exactly|indeed|now|equal to)\b|"
    r"(?:given|represented) by\b|approximately\b|approx\.?|about\b|roughly\b|again\b|,)+"
)


def claims(drawn: Outline) -> list[Claim]:
    """Find all claims, in order; a statement that holds a box is that box's."""
    text = drawn.text
    found = list(_boxed_claims(drawn))
    for match in list(_STATED.finditer(text))[-_MOST_CLAIMS:]:
        begin, end = statement(text, match)
        if BOX not in text[begin:end] and begin < end:
            cut = _REMARK.search(text, begin, end)
            value = drawn.restore(begin, cut.start() if cut else end)
            value = _INTRODUCTION.sub("", value).strip().rstrip(".,;:。").strip(" *_")
            around = stated_context(text, match, end)
            rejected = is_rejected(around) or is_questioned(match["gap"], text[begin:end])
            strength = 4 if match["final"] or match["hashes"] is not None else 3
            strength = 0 if _IF.search(around.sentence) else strength
            value = value if len(value) <= LONGEST else ""
            found.append(Claim(match.start(), end, value, strength, rejected, False))
    return sorted(found)


def statement(text: str, match: re.Match[str]) -> tuple[int, int]:
    """Return where the value begins and ends that follows "the answer is".

    That is the rest of the sentence, or the next line with text in it, if there is no rest.
    """
    begin = match.end()
    blank = re.compile(r"[\s*_:：]{0,40}").match(text, begin)
    begin = blank.end() if blank else begin
    stop = _SENTENCE_END.search(text, begin, begin + LONGEST)
    if stop:
        return begin, stop.start()
    return begin, len(text) if len(text) - begin <= LONGEST else begin


def stated_context(text: str, match: re.Match[str], end: int) -> Context:
    """The words around a statement: before its "answer", and after its value."""
    around = context(text, match.start(), end)
    verb = match["gap"] + " " + (match["verb"] or "") if match["verb"] else ""
    return around._replace(clause=around.clause + verb)


def is_questioned(gap: str | None, value: str) -> bool:
    """Whether "the answer is ..." goes on with a denial or a question."""
    denied = re.search(r"(?i)\bnot\b|n['’]t\b|\bcannot\b|\d", gap or "")
    return bool(denied or re.match(r"(?i)\s*(?:not|never|neither|nicht|no es|不是)\b", value))


def _boxed_claims(drawn: Outline) -> Iterator[Claim]:
    text = drawn.text
    places = [place for place in drawn.contents if text[place] == BOX][-_MOST_CLAIMS:]
    groups: list[list[int]] = []
    for place in places:
        between = text[groups[-1][-1] + 1 : place] if groups else None
        if between is not None and len(between) < 60 and _JOINED.fullmatch(between):
            groups[-1].append(place)
        elif between is not None and _CHAINED.fullmatch(between):
            if "=" in between:  # a = b: the last; a ≈ 0.3: the first
                groups[-1][-1] = place
        else:
            groups.append([place])
    for group in groups:
        begin, end = group[0], group[-1] + 1
        values = list(dict.fromkeys(drawn.contents[place] for place in group))
        value = ", ".join(values)
        around = context(text, begin, end)
        alternative = bool(_ALTERNATIVE.search(around.sentence[-80:]))
        value = value if len(value) <= LONGEST and all(values) else ""
        rejected = is_rejected(around, alternative=alternative)
        yield Claim(begin, end, value, _strength(text, begin, around), rejected, alternative)


def _strength(text: str, begin: int, around: Context) -> int:
    said = around.sentence[-120:]
    if _IF.search(around.sentence):
        return 0
    if not said.strip(" *_$#>:"):
        lines = text[max(0, begin - 200) : begin].rstrip(" *_$#>\n:").rsplit("\n", 1)
        said = lines[-1] if _HEADING.match(lines[-1].strip("*_# ")) else said
    if re.search(
        rf"(?i)(?:\bfinal\s|最终).{{0,20}}?(?:{ANSWER})|(?:{ANSWER})\s*,?\s*finally", said
    ):
        return 4
    if re.search(rf"(?i){ANSWER}", said):
        return 3
    return 2 if _CONCLUSION.search(said) else _BOXED


def settle(text: str, found: list[Claim], keys: list[str | None]) -> int | None:
    """Choose among claims: the index of the one that counts, or None where there is no answer.

    Args:
        text: the text that the claims are in.
        found: claims in the text's order.
        keys: what each claims, so that equal answers are equal; None: it claims nothing readable.
    """
    standing = [i for i, claim in enumerate(found) if not claim.rejected and keys[i] is not None]
    if not standing:
        return None
    strongest = max(found[i].strength for i in standing)
    chosen = [i for i in standing if found[i].strength == strongest]
    last = chosen[-1]
    if any(found[i].alternative and i >= last and keys[i] != keys[last] for i in standing):
        return None
    if found[last].alternative and len(standing) > 1 and len({keys[i] for i in standing}) > 1:
        return None
    others = [i for i in chosen if keys[i] != keys[last]]
    if not others:
        return last
    # Boxes of earlier paragraphs hold intermediate results, as R1's protocol takes them.
    between = text[found[others[-1]].end : found[last].begin]
    return last if strongest == _BOXED and _PARAGRAPH.search(between) else None


def standing_claims(text: str, found: list[Claim]) -> list[Claim]:
    """Drop claims that a correction between them and a later claim takes back.

    A text that takes its last claim back ("Wait, ...") has none left.
    """
    kept: list[Claim] = []
    if found and _RETRACTED.search(text, max(claim.end for claim in found)):
        return []
    later: Claim | None = None
    for claim in reversed(found):
        if later is not None and is_corrected(text[claim.end : later.end]):
            break
        kept.append(claim)
        later = claim if not claim.rejected else later
    return kept[::-1]
