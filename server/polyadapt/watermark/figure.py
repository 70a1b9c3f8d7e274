"""One picture of an attribution as SVG text: every user's score, what is needed, and the bits.

Knows no files; torch-free, and no more than string formatting.
"""

from __future__ import annotations

import math
from html import escape

from polyadapt.watermark.attribution import Standing

_WIDTH, _LEFT, _RIGHT, _TOP, _TALL = 720, 64, 24, 52, 230
_BASE = _TOP + _TALL
_NUM_BINS = 48
_MOST_NAMED = 6
# Distinct also for readers who do not see red beside green (Okabe and Ito's palette).
_CROWD, _ACCUSED, _NEEDED, _INK, _PALE = "#0072b2", "#d55e00", "#000000", "#222222", "#dddddd"


def figure(title: str, standing: Standing) -> str:
    """Return the picture: a histogram of the scores with the threshold, those who are named above
    it, and, where bits were read, what was read over what the best user has.

    Raises ValueError for no scores.
    """
    if not standing.scores:
        raise ValueError("no user's score to draw")
    height = _BASE + 58 + (78 if standing.bits else 0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="13" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(_LEFT, 26, title, 'font-size="16"'),
        *_histogram(standing),
    ]
    if standing.bits:
        parts += _bits(standing)
    return "\n".join([*parts, "</svg>", ""])


def _histogram(standing: Standing) -> list[str]:
    scores = standing.scores
    ends = [*scores.values(), *([standing.threshold] if math.isfinite(standing.threshold) else [])]
    low, high = min(ends), max(ends)
    margin = max((high - low) * 0.04, 0.5)
    low, high = low - margin, high + margin
    width = _WIDTH - _LEFT - _RIGHT

    def px(score: float) -> float:
        return round(_LEFT + width * (score - low) / (high - low), 1)

    counts = [0] * _NUM_BINS
    for score in scores.values():
        counts[min(int((score - low) / (high - low) * _NUM_BINS), _NUM_BINS - 1)] += 1
    # Logarithmic, so that one user beside a thousand is seen.
    most = math.log2(1 + max(counts))
    parts = [f'<path d="M{_LEFT} {_BASE}H{_WIDTH - _RIGHT}" stroke="{_INK}"/>']
    count = 1
    while math.log2(1 + count) <= most:
        y = round(_BASE - _TALL * math.log2(1 + count) / most, 1)
        parts.append(f'<path d="M{_LEFT} {y}H{_WIDTH - _RIGHT}" stroke="{_PALE}"/>')
        parts.append(_text(_LEFT - 8, y + 4, str(count), 'text-anchor="end"'))
        count *= 4
    bar = width / _NUM_BINS
    for place, number in enumerate(counts):
        if number:
            tall = _TALL * math.log2(1 + number) / most
            parts.append(
                f'<rect x="{_LEFT + bar * place:.1f}" y="{_BASE - tall:.1f}" '
                f'width="{bar * 0.92:.1f}" height="{tall:.1f}" fill="{_CROWD}"/>'
            )
    step = _nice_step(high - low)
    tick = math.ceil(low / step) * step
    while tick <= high:
        parts.append(f'<path d="M{px(tick)} {_BASE}v5" stroke="{_INK}"/>')
        parts.append(_text(px(tick), _BASE + 20, f"{tick:g}", 'text-anchor="middle"'))
        tick += step
    label = f"{standing.unit}; how many of {len(scores)} users (logarithmic)"
    parts.append(_text(_LEFT + width / 2, _BASE + 40, label, 'text-anchor="middle"'))
    if math.isfinite(standing.threshold):
        x = px(standing.threshold)
        parts.append(f'<path d="M{x} {_TOP}V{_BASE}" stroke="{_NEEDED}" stroke-dasharray="5 4"/>')
        parts.append(_text(x - 6, _TOP + 12, "needed", 'text-anchor="end"'))
    for place, user in enumerate(standing.accused[:_MOST_NAMED]):
        x, y = px(scores[user]), _TOP + 32 + 18 * place
        parts.append(f'<path d="M{x} {y + 4}V{_BASE}" stroke="{_ACCUSED}"/>')
        parts.append(f'<circle cx="{x}" cy="{y}" r="4.5" fill="{_ACCUSED}"/>')
        parts.append(_text(x - 9, y + 4, user, f'text-anchor="end" fill="{_ACCUSED}"'))
    return parts


def _bits(standing: Standing) -> list[str]:
    bits, own = standing.bits, standing.own_bits
    top, width = _BASE + 58, _WIDTH - _LEFT - _RIGHT
    cell = width / len(bits)
    best = max(standing.scores, key=lambda user: standing.scores[user])
    parts = [
        _text(_LEFT - 8, top + 15, "read", 'text-anchor="end"'),
        _text(_LEFT - 8, top + 38, "best", 'text-anchor="end"'),
        _text(
            _LEFT,
            top + 66,
            f"bits: dark 1, light 0, crossed erased; orange where {best} has another",
        ),
    ]
    for place, (bit, other) in enumerate(zip(bits, own, strict=True)):
        x = _LEFT + cell * place
        for row, value in ((top, bit), (top + 23, other)):
            fill = {None: "#ffffff", 0: "#cfe3f1", 1: _CROWD}[value]
            differs = bit is not None and bit != other
            edge = f'stroke="{_ACCUSED}" stroke-width="2"' if differs else 'stroke="#ffffff"'
            parts.append(
                f'<rect x="{x:.1f}" y="{row}" width="{cell * 0.9:.1f}" height="19" fill="{fill}" '
                f"{edge}/>"
            )
        if bit is None:
            end = x + cell * 0.9
            parts.append(
                f'<path d="M{x:.1f} {top}L{end:.1f} {top + 19}M{end:.1f} {top}L{x:.1f} {top + 19}" '
                f'stroke="{_INK}"/>'
            )
    return parts


def _nice_step(span: float) -> float:
    power = 10.0 ** math.floor(math.log10(span / 5))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power * 8 >= span)


def _text(x: float, y: float, text: str, attributes: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" {attributes}>{escape(text)}</text>'
