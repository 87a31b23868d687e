"""Where the answer is in a completion or a solution, and its text in one spelling.

A solution is written in many ways: a number, bare LaTeX, `$...$`, prose that ends in `\\boxed{}`, GSM8K's
`####`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

_THINK = re.compile(r"<think>.*?</think>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_MATH = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)", re.DOTALL)
_CONNECTOR = re.compile(
    r"[\s$]*(?:,|;|\\text\s*\{\s*)?[\s$]*(?:,|and|or|\\text\s*\{\s*(?:and|or)\s*\})[\s$]*"
)
_BETWEEN_MATHS = re.compile(r"(?:\s|,|;|\.|and|or)*")
_PREAMBLE = re.compile(
    r"^.*\b(?:answer|result|solution|total|value)\b\s*(?:is|are|=|:)\s*:?\s*", re.DOTALL | re.I
)

_GLYPHS = {
    **dict.fromkeys("−–—﹣－", "-"),
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "∕": "/", "⁄": "/",
    "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt", "°": r"^\circ ", "±": r"\pm ", "≤": r"\le ", "≥": r"\ge ",
    "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "θ": r"\theta ", "∠": "",
    "²": "^{2}", "³": "^{3}", "⁴": "^{4}", "。": ".", "、": ",",
    "≈": r"\approx ",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "⅕": r"\frac{1}{5}", "⅖": r"\frac{2}{5}", "⅗": r"\frac{3}{5}", "⅘": r"\frac{4}{5}", "⅙": r"\frac{1}{6}",
    "⅚": r"\frac{5}{6}", "⅛": r"\frac{1}{8}", "⅜": r"\frac{3}{8}", "⅝": r"\frac{5}{8}", "⅞": r"\frac{7}{8}",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "",
}  # fmt: skip
_FULL_WIDTH = {chr(0xFEE0 + code): chr(code) for code in range(0x21, 0x7F)}
_GLYPH = str.maketrans({**_FULL_WIDTH, **_GLYPHS})


def _mixed(found: re.Match[str]) -> str:
    """11\\frac{1}{2} as a sum, also where more follows; with a larger numerator it is a product."""
    whole, above, below = found.groups()
    return f"({whole}+\\frac{{{above}}}{{{below}}})" if int(above) < int(below) else found[0]


_SPELLINGS: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle|textstyle|limits)(?![a-zA-Z])[lr]?"), ""),
    (re.compile(r"\\(?:textbf|textit|textrm|mathrm|mathbf|mbox|operatorname|bf|rm)\s*(?=\{)"), r"\\text"),
    (re.compile(r"(?<!\\)\\[,;:!> ]|\\q?quad(?![a-zA-Z])|~"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:leq|leqslant)(?![a-zA-Z])"), r"\\le"),
    (re.compile(r"\\(?:geq|geqslant)(?![a-zA-Z])"), r"\\ge"),
    (re.compile(r"\^\s*\{\s*\\(?:circ|degree)\s*\}|\\degree|\^\s*\\degree"), r"^\\circ"),
    (re.compile(r"(?<!\\)%"), r"\\%"),
    (re.compile(r"^\s*\\?[a-zA-Z]\s*\\in(?![a-zA-Z])\s*"), ""),
    (re.compile(r"^\s*(?:=|\\approx(?![a-zA-Z]))\s*"), ""),
    (re.compile(r"\\langle(?![a-zA-Z])"), "("),
    (re.compile(r"\\rangle(?![a-zA-Z])"), ")"),
    (
        re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc)\b\s*[({]?\s*)(\d+(?:\.\d+)?)\s*\^\s*\\circ"),
        r"\1(\\frac{\2\\pi}{180})",
    ),
    # 1.5e3; mixed numbers: 1 1/4; thousands: 1 000 000, 12,34,567
    (re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![A-Za-z0-9.])"), r"\1\\times 10^{\2}"),
    (re.compile(r"(?<![\d./,])(\d+)\s+(\d+)/(\d+)(?![\d/])"), r"\1\\frac{\2}{\3}"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)(?!\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"(?<![\w.^\\}])(\d+)\s*\\frac\{([1-9]\d*)\}\{(\d+)\}"), _mixed),
    (re.compile(r"^(-?)(\d{1,3}) (\d{3})(?: (\d{3}))?(?: (\d{3}))?(?=$|[.]|\s)"), r"\1\2\3\4\5"),
    (re.compile(r"^(-?)(\d{1,2}),(\d{2}),(\d{3})$"), r"\1\2\3\4"),
]  # fmt: skip
_WRAPPED = re.compile(r"\\text\s*\{([^{}]*)\}")


def answers_of(completion: str) -> str | None:
    """The text of a completion's answer: what stands in the first `<answer>`, or in the last `\\boxed{}`.

    What is thought (`<think>`) is no answer; a thought that does not end leaves none. Boxes that only an
    "and", an "or" or a comma joins are one answer. None: there is neither tag nor box.
    """
    said = _THINK.sub("", completion).rpartition("</think>")[2].partition("<think>")[0]
    if tagged := _ANSWER.search(said):
        return boxed(tagged[1]) or tagged[1]
    return boxed(said)


def gold_of(solution: str) -> str:
    """The part of a solution that is its answer."""
    said = solution.rpartition("</think>")[2]
    if tagged := _ANSWER.search(said):
        said = tagged[1]
    found = boxed(said)
    if found is not None:
        return found
    return said.rpartition("####")[2] if "####" in said else said


def boxed(text: str) -> str | None:
    """The content of the last box, with those that it is joined to; None if there is none."""
    boxes = []
    position = 0
    while start := _BOX.search(text, position):
        end = _closing(text, start.end())
        boxes.append((start.start(), end, text[start.end() : end - 1]))
        position = end
    if not boxes:
        return None
    joined = [boxes[-1][2]]
    for (_, end, content), (start_of_next, _, _) in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        if not _CONNECTOR.fullmatch(text[end:start_of_next]):
            break
        joined.insert(0, content)
    distinct = list(dict.fromkeys(part.strip() for part in joined))
    return boxed(distinct[0]) or distinct[0] if len(distinct) == 1 else ", ".join(distinct)


def _closing(text: str, start: int) -> int:
    """Behind the brace that closes the one before `start`; the end of the text if none does."""
    depth = 1
    for place in range(start, len(text)):
        if text[place] in "{}" and text[place - 1] != "\\":
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return place + 1
    return len(text) + 1


def spelled(text: str) -> str:
    """An answer in one spelling of LaTeX, without what surrounds it. What is said stays the same."""
    text = unicodedata.normalize("NFC", text).translate(_GLYPH)
    text = text.strip().strip("*`").strip()
    text = _without_dollars(text)
    if not re.search(r"\\begin", text):
        text = text.replace("\\\\", "\\") if re.search(r"\\\\[a-zA-Z]", text) else text
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    text = re.sub(r"\s+", " ", text).strip().rstrip(".,;:").strip()
    if (whole := _WRAPPED.fullmatch(text)) and re.search(r"\d", whole[1]):
        return spelled(whole[1])
    return text


def prose_answer(text: str) -> str | None:
    """The one piece of mathematics in a sentence, or what follows "the answer is"; None if in doubt."""
    if (answer := _PREAMBLE.sub("", text)) != text:
        return answer.strip().rstrip(".")
    maths = [next(filter(None, found.groups())) for found in _MATH.finditer(text)]
    if maths:
        return maths[0] if len(maths) == 1 else None
    numbers = re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?:\s*\\?%)?", text)
    return numbers[0].rstrip(",") if len(numbers) == 1 else None


def is_prose(text: str) -> bool:
    """Whether a text is a sentence in which mathematics may stand, and not mathematics itself."""
    plain = re.sub(r"\\(?:text|begin|end)\s*\{[^{}]*\}|\\[a-zA-Z]+", " ", text)
    words = [
        w for w in re.findall(r"[A-Za-z]{2,}", plain) if w not in ("and", "or", "sin", "cos", "tan", "log")
    ]
    return len(words) > 1


def _without_dollars(text: str) -> str:
    """`$x = 1$ and $x = 2$` without the dollars; a sentence stays as it is, and so does a sum of money."""
    found = list(_MATH.finditer(text))
    outside = _MATH.sub("", text)
    if found and (_BETWEEN_MATHS.fullmatch(outside) or not is_prose(outside)):
        return _MATH.sub(lambda m: " " + next(filter(None, m.groups())) + " ", text).strip()
    return text
