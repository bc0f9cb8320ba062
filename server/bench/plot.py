"""Draws a benchmark as one SVG, bare or in an HTML page, that loads nothing from elsewhere.

A sweep is drawn as latency over the offered rate. A single run is drawn as the cumulative
distribution of each latency.
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import NamedTuple

from ...engine.errors import ConfigurationError
from .report import METRICS, BenchResult, RunRecords, RunReport, table, values_ms

WIDTH, HEIGHT = 460, 320
"""Size of one panel in pixels."""
LEFT, RIGHT, TOP, BOTTOM = 76, 16, 56, 48
"""Margins of a panel in pixels."""
COLUMNS = 2
"""Panels side by side."""
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
"""The palette of Okabe and Ito, which colour-blind readers can tell apart."""
CDF_POINTS = 200
"""Maximum points of a curve of a single run."""
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.t{font-weight:600;font-size:14px}"
    ".g{stroke:#ddd}.a{stroke:#666;fill:none}.l{fill:none;stroke-width:2}"
)


class Series(NamedTuple):
    """One curve of a panel."""

    name: str
    points: list[tuple[float, float]]


class Panel(NamedTuple):
    """One plot of the drawing."""

    title: str
    x_label: str
    y_label: str
    series: list[Series]


def check_plot_path(path: Path) -> None:
    """Raise ConfigurationError for a kind of file that cannot be written."""
    if path.suffix not in (".html", ".svg"):
        raise ConfigurationError(
            f"--plot writes .html and .svg, not {path.suffix or 'a file without an ending'}: "
            "any browser shows both and can save them as an image"
        )


def write_plot(path: Path, result: BenchResult, last: RunRecords) -> None:
    """Write the plot of a result. A single run is drawn from its records, `last`."""
    runs = result.runs
    panels = sweep_panels(runs) if len(runs) > 1 else run_panels(last)
    tables = "\n\n".join(table(run) for run in runs)
    write_panels(path, panels, f"{result.model}, {result.date}", tables)


def write_panels(path: Path, panels: list[Panel], heading: str, text: str) -> None:
    """Write panels as an image, or as a page with a heading above them and text below."""
    svg = render_svg(panels)
    if path.suffix == ".html":
        svg = (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(heading)}</title>'
            f"<h1>{escape(heading)}</h1>{svg}<pre>{escape(text)}</pre></html>\n"
        )
    path.write_text(svg, encoding="utf-8")


def sweep_panels(runs: list[RunReport]) -> list[Panel]:
    """Return panels of latency percentiles and of throughput over the offered rate."""
    offered = [(float(run.request_rate), run) for run in runs]
    panels = []
    for metric, title in METRICS.items():
        curves: dict[str, list[tuple[float, float]]] = {}
        for rate, run in offered:
            distribution = run.latency_ms[metric]
            for name, value in (distribution.percentiles if distribution else {}).items():
                curves.setdefault(name, []).append((rate, value))
        series = [Series(name, points) for name, points in curves.items()]
        panels.append(Panel(title, "requests/s offered", "ms", series))
    served = [Series("completed", [(rate, run.requests_per_s) for rate, run in offered])]
    good = [(rate, run.goodput.requests_per_s) for rate, run in offered if run.goodput]
    if good:
        served.append(Series("within bounds", good))
    panels.append(Panel("Requests served", "requests/s offered", "requests/s", served))
    tokens = [(rate, run.output_tokens_per_s) for rate, run in offered]
    panels.append(
        Panel("Output tokens", "requests/s offered", "tokens/s", [Series("tokens/s", tokens)])
    )
    return panels


def run_panels(run: RunRecords) -> list[Panel]:
    """Return a panel with the cumulative distribution of each latency."""
    panels = []
    for metric, title in METRICS.items():
        values = sorted(values_ms(run.records, metric))
        count = len(values)
        picks = sorted({round(i * (count - 1) / CDF_POINTS) for i in range(CDF_POINTS + 1)})
        points = [(values[i], 100 * (i + 1) / count) for i in picks] if values else []
        panels.append(Panel(title, "ms", "% at most", [Series(metric.upper(), points)]))
    return panels


def render_svg(panels: list[Panel]) -> str:
    """Draw the panels in rows of COLUMNS."""
    rows = math.ceil(len(panels) / COLUMNS)
    width, height = COLUMNS * WIDTH, rows * HEIGHT
    drawn = "".join(
        f'<g transform="translate({i % COLUMNS * WIDTH},{i // COLUMNS * HEIGHT})">'
        f"{_draw(panel)}</g>"
        for i, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}"><style>{_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{drawn}</svg>'
    )


def ticks(high: float) -> list[float]:
    """Return 0 and round steps (1, 2 or 5 times a power of ten) up to at least `high`."""
    if high <= 0:
        return [0.0, 1.0]
    raw = high / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return [i * step for i in range(math.ceil(high / step - 1e-9) + 1)]


def _draw(panel: Panel) -> str:
    points = [point for series in panel.series for point in series.points]
    x_ticks = ticks(max((x for x, _ in points), default=0.0))
    y_ticks = ticks(max((y for _, y in points), default=0.0))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x_of(value: float) -> float:
        return LEFT + value / x_ticks[-1] * (right - LEFT)

    def y_of(value: float) -> float:
        return bottom - value / y_ticks[-1] * (bottom - TOP)

    parts = [_text(LEFT, 20, panel.title, "start", "t")]
    for value in y_ticks:
        y = y_of(value)
        parts.append(f'<line class="g" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{value:g}", "end"))
    parts += [_text(x_of(value), bottom + 16, f"{value:g}", "middle") for value in x_ticks]
    parts.append(f'<path class="a" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    parts.append(_text((LEFT + right) / 2, HEIGHT - 12, panel.x_label, "middle"))
    parts.append(_text(LEFT - 6, TOP - 8, panel.y_label, "end"))
    legend = float(LEFT + 12)
    for series, colour in zip(panel.series, COLOURS, strict=False):
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in series.points)
        parts.append(f'<polyline class="l" stroke="{colour}" points="{path}"/>')
        if len(series.points) <= 20:
            parts += [
                f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3.5" fill="{colour}">'
                f"<title>{escape(series.name)}: {x:g}, {y:.4g}</title></circle>"
                for x, y in series.points
            ]
        parts.append(f'<rect x="{legend}" y="{TOP - 26}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(legend + 16, TOP - 16, series.name, "start"))
        legend += 30 + 7 * len(series.name)
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{style}" {place}>{escape(text)}</text>'
