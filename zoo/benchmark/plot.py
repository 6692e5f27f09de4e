"""A report as one SVG, written by hand: throughput of each case beside what its roofline allows, and histograms of latencies."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import floor, log10
from typing import Any

import numpy as np

from zoo.benchmark.latency import Latencies
from zoo.benchmark.workload import Floats

WIDTH, MARGIN, LABELS = 960, 32, 150
BAR, GAP = 22, 16  # heights of a bar and of the space between two
BINS, HISTOGRAM = 48, 110  # bins of a histogram, and its height
TAIL = 1.25  # a histogram ends at this many times its 99th percentile
INK, MUTED, RULE, TRACK, FILL, LIMIT = "#1f2933", "#667085", "#d5dae1", "#eef1f5", "#2f6db3", "#c2410c"
STYLE = "font-family:system-ui,sans-serif;font-size:12px"


class Canvas:
    """Lines of an SVG, with the little that is drawn here."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def text(
        self, x: float, y: float, text: str, fill: str = INK, anchor: str = "start", size: int = 12, bold: bool = False
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.lines.append(
            f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" text-anchor="{anchor}" font-size="{size}"{weight}>{escape(text)}</text>'
        )

    def box(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        self.lines.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" fill="{fill}"/>')

    def line(self, x1: float, y1: float, x2: float, y2: float, stroke: str = RULE, width: float = 1, dash: str = "") -> None:
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.lines.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}" stroke-width="{width}"{dashes}/>'
        )


def svg(data: dict[str, Any], found: Sequence[Latencies]) -> str:
    """``data`` as ``zoo bench --json`` prints it; ``found``: the latencies of its cases, in their order."""
    canvas, configured = Canvas(), data["configuration"]
    machine = configured["machine"]
    canvas.text(MARGIN, 36, data["ref"], size=16, bold=True)
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    canvas.text(MARGIN, 56, f"{where} · {configured['dtype']} · {configured['date']}", MUTED)
    y = _throughput(canvas, data["cases"], 96)
    for case, latencies in zip(data["cases"], found, strict=True):
        y = _latencies(canvas, case, latencies, y + 40)
    height = y + MARGIN
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}"'
    body = "\n".join(canvas.lines)
    return f'{head} style="{STYLE}" role="img">\n<rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n'


def _throughput(canvas: Canvas, cases: Sequence[dict[str, Any]], y: float) -> float:
    """A bar for each case, and a line at the most that its roofline allows. Gives the y behind them."""
    canvas.text(MARGIN, y, "Output tokens a second", bold=True)
    limits = [case["roofline"]["output_tokens_per_s"] for case in cases]
    if any(limits):
        canvas.line(MARGIN + 190, y - 4, MARGIN + 206, y - 4, LIMIT, 2)
        canvas.text(MARGIN + 212, y, "roofline of the steps that ran", MUTED)
    left, room = MARGIN + LABELS, WIDTH - 2 * MARGIN - LABELS - 170
    most = max([case["output_tokens_per_s"] for case in cases] + [limit for limit in limits if limit])
    y += 16
    for case, limit in zip(cases, limits, strict=True):
        rate = case["output_tokens_per_s"]
        canvas.text(left - 10, y + 15, case["case"], anchor="end")
        canvas.box(left, y, room * (limit or most) / most, BAR, TRACK)
        canvas.box(left, y, room * rate / most, BAR, FILL)
        end = room * max(rate, limit or 0) / most
        if limit:
            canvas.line(left + room * limit / most, y - 3, left + room * limit / most, y + BAR + 3, LIMIT, 2)
        share = f" ({case['roofline']['fraction']:.0%} of {limit:,.0f})" if limit else ""
        canvas.text(left + end + 8, y + 15, f"{rate:,.0f}{share}")
        y += BAR + GAP
    return y


def _latencies(canvas: Canvas, case: dict[str, Any], found: Latencies, y: float) -> float:
    """Two histograms side by side. Gives the y behind them."""
    load = f"{case['rate']:g} requests/s" if case["rate"] else "all queued at once"
    canvas.text(MARGIN, y, f"{case['case']}: latency, {load}", bold=True)
    width = (WIDTH - 3 * MARGIN) / 2
    for place, (name, values) in enumerate((("time to first token", found.ttft), ("between two tokens", found.inter_token))):
        _histogram(canvas, name, values * 1e3, MARGIN + place * (width + MARGIN), y + 24, width)
    return y + HISTOGRAM + 78


def _histogram(canvas: Canvas, name: str, values: Floats, x: float, y: float, width: float) -> None:
    """Shares of values in milliseconds, up to a little behind the 99th percentile."""
    if not len(values):
        canvas.text(x, y + 10, f"{name}: none", MUTED)
        return
    p50, p99 = (float(one) for one in np.percentile(values, (50, 99)))
    most = max(p99 * TAIL, 1e-6)
    counts, _ = np.histogram(values, BINS, (0, most))
    beyond = int((values > most).sum())
    behind = f"; {beyond / len(values):.2%} beyond" if beyond else ""
    canvas.text(x, y + 10, f"{name}, ms: p50 {p50:.4g}, p99 {p99:.4g}{behind}", MUTED)
    top = y + 34
    base = top + HISTOGRAM
    step = width / BINS
    for place, count in enumerate(counts.tolist()):
        if count:
            tall = max(1.0, HISTOGRAM * count / counts.max())
            canvas.box(x + place * step, base - tall, step - 1, tall, FILL)
    canvas.line(x, base, x + width, base)
    near = (p99 - p50) * width / most < 28  # pixels: two labels would lie on each other
    for value, label in ((p50, "" if near else "p50"), (p99, "p50, p99" if near else "p99")):
        at = x + width * value / most
        canvas.line(at, top, at, base, INK, 1, "3 3")
        canvas.text(at, top - 4, label, INK, "middle", 10)
    for value in _ticks(most):
        at = x + width * value / most
        canvas.line(at, base, at, base + 4)
        canvas.text(at, base + 16, f"{value:g}", MUTED, "middle", 10)


def _ticks(most: float, count: int = 5) -> list[float]:
    """Round numbers from 0 to ``most``, about ``count`` of them."""
    raw = most / count
    power = 10.0 ** floor(log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    return [float(f"{place * step:.6g}") for place in range(int(most / step) + 1)]
