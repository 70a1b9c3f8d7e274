r"""The answer that a text ends in, in the form in which answers are compared. Knows no workflows.

`extract` tries these forms in this order and takes the first that leaves something:

1. marker: what stands between an arrow (`-->`, `->` or a typeset one) and the next word `END`
2. phrase: what follows the last "final answer is", to the end of its sentence or line
3. boxed: the content of the last `\boxed{...}`
4. phrase: what follows the last "answer is", to the end of its sentence or line
5. number: the last number of the text, a fraction `a/b` being one

The forms are those of the LoRID evaluation (Xinhe-Li/LoRID:src/evaluation/parser.py) in the order
of this list; the code, and where a phrase ends, are our own. `normalise` says when two answers are
the same; it computes nothing: 2/4 and 1/2 are different answers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

MAX_ANSWER = 256  # characters; what is longer is no answer

_ARROWS = ("->", "→")  # "-->" ends in the first
_END = re.compile(r"\bEND\b")
_FINAL_ANSWER = re.compile(r"final answer is", re.IGNORECASE)
_ANSWER = re.compile(r"answer is", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)")
_BOXED = "\\boxed{"
_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A sign behind a letter, a digit or a bracket is an operator.
_NUMBER = re.compile(rf"(?:(?<![\w)\]}}])[-+])?(?:{_UNSIGNED})(?:/\d+)?")

_MINUS_AND_SLASH = {0x2212: "-", 0x2044: "/"}  # typeset minus and fraction slash
_TEX_NOISE = re.compile(r"\\[!,;:()\[\]$]|\\(?:left|right)(?![A-Za-z])|\^\{?\\circ\}?|°")
_TEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}")
_TEX_FRACTION = re.compile(r"\\[dt]frac(?![A-Za-z])")
_SHORT_FRACTION = re.compile(r"\\frac\s*(\d)\s*(\d)")
_LEFT = " \t\n\r$*`\"':€£¥"
_RIGHT = " \t\n\r$*`\"'.,;:%€£¥"
_VARIABLE = re.compile(r"[A-Za-z]\s*=\s*(?=\S)")
# Numbers that are reckoned with, an x between two of them among the operators, up to the last "=".
_RECKONING = re.compile(
    r"(?:[\d\s.,+*/$()%=-]|\\(?:times|cdot)|(?:(?<=\d)|(?<=\d ))[x\u00d7](?= ?\d))*"
    r"=\s*(?=[-+.$\\(\d])"
)
_WITH_UNIT = re.compile(rf"([-+]?[$€£¥]?(?:{_UNSIGNED}))%?[,;]?\s+([A-Za-z]{{2,}})")
# Words behind a number that change its value, so that they are no unit.
_VALUE_WORDS = frozenset(
    {"and", "or", "to", "pi", "times", "over", "plus", "minus", "point", "divided", "squared",
     "cubed", "half", "halves", "third", "thirds", "quarter", "quarters", "dozen", "hundred",
     "thousand", "million", "billion", "trillion"}
)  # fmt: skip
_FRACTION = re.compile(r"([-+]?)\\frac\{(-?)(\d+)\}\{(\d+)\}")
_PLAIN_NUMBER = re.compile(rf"([-+]?)[$€£¥]?({_UNSIGNED})")
_MATHEMATICS = re.compile(r"[\d\\=+*/^_{}()<>-]")


def extract(text: str) -> str | None:
    """Return the normalised answer of a text, None when it has none."""
    for find in _FORMS:
        found = find(text)
        if found is not None and len(found) <= MAX_ANSWER and (answer := normalise(found)):
            return answer
    return None


def normalise(answer: str) -> str:
    r"""Return the form in which answers are compared, "" when nothing is left.

    In this order: typeset minus and fraction slash as ASCII; `\boxed{x}` as x; TeX that changes
    only the looks, degree signs and `\text{}` around words go; `\dfrac`, `\tfrac` and `\frac12` as
    `\frac{1}{2}`; quotes, `$`, `*`, currency, a per cent sign and final punctuation around it go;
    a leading `x =` goes, and so does a calculation `4 * 3 =`; a bracket that only closes goes; a
    unit or explanation behind a number goes; `\frac{a}{b}` of integers as a/b; a number without
    plus sign, thousands' commas, leading and trailing zeros; white space goes where there is
    mathematics, and becomes one space between words.
    """
    text = unicodedata.normalize("NFC", answer.strip()).translate(_MINUS_AND_SLASH)
    text = _boxed(text) or text
    text = _TEX_TEXT.sub(r"\1", text)
    text = _TEX_NOISE.sub("", text.replace("\\%", "%").replace("\\ ", " ").replace("~", " "))
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", _TEX_FRACTION.sub(r"\\frac", text))
    text = text.lstrip(_LEFT).rstrip(_RIGHT)
    if variable := _VARIABLE.match(text):
        text = text[variable.end() :]
    if reckoning := _RECKONING.match(text):
        text = text[reckoning.end() :].lstrip(_LEFT)
    if text.endswith(")") and text.count(")") > text.count("("):
        text = text[:-1].rstrip(_RIGHT)
    if (unit := _WITH_UNIT.match(text)) and unit[2].lower() not in _VALUE_WORDS:
        text = unit[1]
    if fraction := _FRACTION.fullmatch("".join(text.split())):
        sign = "-" if (fraction[1] == "-") != (fraction[2] == "-") else ""
        text = f"{sign}{fraction[3]}/{fraction[4]}"
    if number := _PLAIN_NUMBER.fullmatch(text):
        return _plain(number[1], number[2])
    if _MATHEMATICS.search(text):
        return "".join(text.split())
    return " ".join(text.split())


def _plain(sign: str, digits: str) -> str:
    """Return a decimal number as its shortest numeral."""
    whole, _, rest = digits.replace(",", "").partition(".")
    whole, rest = whole.lstrip("0") or "0", rest.rstrip("0")
    numeral = f"{whole}.{rest}" if rest else whole
    return f"-{numeral}" if sign == "-" and numeral != "0" else numeral


def _marker(text: str) -> str | None:
    """Return what stands before the first END behind an arrow, from the nearest arrow on."""
    arrows = [at for arrow in _ARROWS if (at := text.find(arrow)) >= 0]
    end = _END.search(text, min(arrows)) if arrows else None
    if end is None:
        return None
    return text[max(_behind_last(text, arrow, end.start()) for arrow in _ARROWS) : end.start()]


def _behind_last(text: str, arrow: str, end: int) -> int:
    at = text.rfind(arrow, 0, end)
    return at + len(arrow) if at >= 0 else -1


def _phrase(pattern: re.Pattern[str]) -> Callable[[str], str | None]:
    def find(text: str) -> str | None:
        ends = [match.end() for match in pattern.finditer(text)]
        if not ends:
            return None
        rest = text[ends[-1] :].lstrip(" \t\n\r:*")
        end = _SENTENCE_END.search(rest)
        return rest if end is None else rest[: end.start()]

    return find


def _boxed(text: str) -> str | None:
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    depth = 1
    for position in range(start + len(_BOXED), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len(_BOXED) : position]
    return None  # it was cut off


def _last_number(text: str) -> str | None:
    last: str | None = None
    for match in _NUMBER.finditer(text):
        last = match[0]
    return last


_FORMS: tuple[Callable[[str], str | None], ...] = (
    _marker,
    _phrase(_FINAL_ANSWER),
    _boxed,
    _phrase(_ANSWER),
    _last_number,
)
