"""Charts inside the page: SVG by matplotlib that takes the page's colours, and PNG files as they are."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from ...hf import Report
from ..pictures import plot_tokens_per_layer

_INK, _PAPER = "#000000", "#ffffff"  # what the figures are drawn in
_SIZE = (4.0, 3.3)  # inches: legible on a phone


@dataclass(frozen=True)
class Picture:
    """A PNG file inside the page.

    Attributes:
        uri: the file as a data URI.
        text: what it shows, for those who do not see it.
    """

    uri: str
    text: str


def tokens_chart(report: Report, method: str, name: str) -> Markup:
    """The vision tokens in each layer's attention.

    Args:
        report: report of the reduced prefill.
        method: name of the method.
        name: unique within the page.
    """
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = plot_tokens_per_layer(figure, report, method)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False, fontsize=9)
    return _inline(figure, name, f"Vision tokens in the attention of each layer: {report.vision_tokens_per_layer}")


def read_picture(path: Path, text: str) -> Picture:
    """A picture that the command has written."""
    return Picture("data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(), text)


def _inline(figure: Figure, name: str, text: str) -> Markup:
    """The figure as an <svg> element, in the colours of the page around it."""
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="\w+">', "<g>", svg)  # "axes_1" is in every figure
    svg = svg.replace(_INK, "currentColor").replace(_PAPER, "var(--paper)")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1))
    label = Markup('<svg role="img" aria-label="{}"').format(text)
    return Markup(svg.replace("<svg", label, 1))
