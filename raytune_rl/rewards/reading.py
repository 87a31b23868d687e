"""The reading of an answer: a choice, words, or mathematics with or without a unit; and when two are
equal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from raytune_rl.rewards.answers import is_prose, prose_answer, spelled
from raytune_rl.rewards.units import Unit, split_unit

_CHOICE = re.compile(r"(?:[Oo]ption|[Cc]hoice)?\s*\(?\s*([A-J])\s*\)?(?:[.:)]\s+.*)?", re.DOTALL)
_CHOICE_ALONE = re.compile(r"\(\s*([A-Ja-j])\s*\)|([A-J])\)?")
_WORDS = re.compile(r"[A-Za-z][A-Za-z'’ \-]*")
_PHRASES = (
    "does not exist", "no real solution", "no real solutions", "all real numbers", "none of the above",
    "none of these", "not enough information", "cannot be determined", "infinitely many solutions",
    "no real roots", "no such number exists", "it does not exist", "all of the above", "neither of these",
)  # fmt: skip
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_DATE_OR_TIME = re.compile(
    r"\d{4}-\d{1,2}-\d{1,2}|\d{1,2}/\d{1,2}/\d{2,4}|\d{1,2}:\d{2}(?::\d{2})?|\d{1,2}(?::\d{2})?\s*[ap]\.?m",
    re.I,
)
_BASE = re.compile(r"(\d[0-9A-Fa-f]*)\s*_\s*\{?(?:\\text\s*\{)?\s*(\d+|[a-z]+)\s*\}*")
# Above it two values are not the same number: decimals have 6 places for math-verify, the others are exact.
_DECIMALS_DIFFER = 5e-6
_EXACT_DIFFER = 1e-20
_DIGITS = 40


@dataclass(frozen=True)
class Reading:
    """An answer, read.

    Attributes:
        text: In one spelling, without blanks; equal texts are equal answers.
        choice: The letter of a multiple choice, in upper case; "" if it is none.
        words: An answer in words, in lower case; "" if it is none.
        value: The mathematics, a sympy object; None if there is none.
        unit: Of the value.
    """

    text: str
    choice: str = ""
    words: str = ""
    value: Any = None
    unit: Unit | None = None


def read(answer: str) -> Reading | None:
    """Reads an answer, which stands alone or in a sentence that leaves no doubt. None: it cannot be read."""
    text = spelled(answer)
    if not text:
        return None
    plain = _TEXT.sub(r"\1", text).strip()
    flat = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", plain)
    if alone := _CHOICE_ALONE.fullmatch(plain):
        return Reading(flat, choice=(alone[1] or alone[2]).upper(), value=_parsed(text))
    if choice := _CHOICE.fullmatch(plain):
        return Reading(flat, choice=choice[1].upper())
    if words := _words(text):
        return Reading(flat, words=words)
    if _WORDS.fullmatch(plain) and re.search(r"[A-Za-z]{3}", plain):
        prose = prose_answer(plain)  # letter by letter a sentence would be a product
        return read(prose) if prose is not None and prose != plain else None
    if (_DATE_OR_TIME.fullmatch(plain) and not re.fullmatch(r"\d+:\d", plain)) or _BASE.fullmatch(plain):
        return Reading(re.sub(r"[{}]", "", flat).lower(), words="")
    body, unit = split_unit(text)
    if is_prose(body):
        prose = prose_answer(body)
        return read(prose) if prose is not None and prose != body else None
    value = _parsed(body)
    return None if value is None else Reading(flat, value=value, unit=unit)


def read_said(completion: str) -> Reading | None:
    """The LaTeX that a completion without tag or box says to be its answer."""
    from math_verify import LatexExtractionConfig, parse

    config = LatexExtractionConfig(boxed_match_priority=-1, try_extract_without_anchor=False)
    said = completion.rpartition("</think>")[2]
    if "<think>" in said:
        return None
    found = parse(said, [config], extraction_mode="first_match", parsing_timeout=None)
    return read(found[-1]) if found and isinstance(found[-1], str) else None


def equal(gold: Reading, given: Reading) -> bool:
    """Whether an answer is the right one."""
    if gold.text == given.text:
        return True
    if gold.choice:
        return gold.choice == (given.choice or given.text.upper())
    if gold.words or gold.value is None:
        return bool(gold.words) and gold.words == given.words
    if given.value is None or _brackets_differ(gold.text, given.text):
        return False
    ours, theirs = gold.value, given.value
    if gold.unit and given.unit and gold.unit != given.unit and gold.unit.dimension and given.unit.dimension:
        if gold.unit.dimension != given.unit.dimension:
            return False
        from sympy import Expr, Rational

        size = gold.unit.size / given.unit.size
        if not isinstance(ours, Expr):
            return False  # a set or an interval is no quantity that can be converted
        ours = ours * Rational(size.numerator, size.denominator)
    return _same(ours, theirs)


def _words(text: str) -> str:
    """An answer in words in one spelling; "" if it is none, or too long to be compared as it stands."""
    plain = re.sub(r"[\s\-’']+", " ", _TEXT.sub(r" \1 ", text)).strip(' .!"').lower()
    in_text = not _TEXT.sub("", text).strip(" .!\"'")
    if not _WORDS.fullmatch(plain):
        return ""
    count = len(plain.split())
    if in_text or plain in _PHRASES:
        return plain
    if count == 2 and len(plain) > 4 and plain.split()[0] not in ("a", "an", "the"):
        return plain
    return plain if count == 1 and (len(plain) > 2 or plain == "no") else ""


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Any:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    config = LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="last"
        ),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    )
    found = parse(f"\\boxed{{{text}}}", [config], extraction_mode="first_match", parsing_timeout=None)
    return found[0] if found and not isinstance(found[0], str) else None


def _brackets_differ(gold: str, given: str) -> bool:
    """A set is not an interval or a point, though math-verify takes {1, 2} for (1, 2)."""
    return {gold[:1], given[:1]} == {"(", "\\"} and (gold + given).count(r"\{") == 1


def _same(gold: Any, given: Any) -> bool:
    from math_verify import verify

    return bool(verify([gold], [given], allow_set_relation_comp=True, timeout_seconds=None)) and not _apart(
        gold, given
    )


def _apart(gold: Any, given: Any) -> bool:
    """Whether two values that math-verify holds for equal are not: it rounds small ones to the same."""
    from sympy import Basic, Expr, Float, MatrixBase, Tuple
    from sympy.core.relational import Relational
    from sympy.sets import FiniteSet

    if isinstance(gold, MatrixBase) and isinstance(given, MatrixBase):
        return gold.shape == given.shape and any(map(_apart, gold.flat(), given.flat()))
    if isinstance(gold, FiniteSet) and isinstance(given, FiniteSet):
        return any(all(_apart(one, other) for other in given.args) for one in gold.args)
    if isinstance(gold, Tuple) and isinstance(given, Tuple):
        return any(map(_apart, gold.args, given.args))
    if isinstance(gold, Relational) or isinstance(given, Relational):
        return False
    if not (isinstance(gold, Expr) and isinstance(given, Expr)) or not isinstance(gold, Basic):
        return False
    names = sorted({s.name for s in gold.free_symbols | given.free_symbols})
    try:
        ours, theirs = _number(gold, names), _number(given, names)
        scale = max(abs(ours), abs(theirs))
        inexact = gold.has(Float) or given.has(Float)
        if not scale > 0 or not scale < float("inf"):
            return False
        return bool(abs(ours - theirs) > scale * (_DECIMALS_DIFFER if inexact else _EXACT_DIFFER))
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        return False


def _number(value: Any, names: list[str]) -> Any:
    """A value in numbers, its symbols in place of which there are some that fit no equation by chance."""
    from sympy import Rational

    places = {s: Rational(1009 + 101 * names.index(s.name), 700) for s in value.free_symbols}
    return value.subs(places).evalf(_DIGITS)
