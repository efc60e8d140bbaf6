"""How charts look: the colours, the grid, the matplotlib settings and the formats of reports and benchmarks."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal

from specd.errors import missing_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Format = Literal["png", "svg"]
# Okabe and Ito's palette: told apart with any colour vision, and of different lightness in print.
BLUE, SKY, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
INK, GREY, SILVER, PALE = "#1F2937", "#6B7280", "#9CA3AF", "#E5E7EB"
TRAINER, WIRE, TARGET = GREEN, ORANGE, BLUE
"""Of a step's time: the trainer's own, the wait for the wire, the wait for the target."""
SMALL: Final = 8.0
"""Points of legends and remarks; ticks and labels have RC's font.size."""
RC: Final[Any] = {
    "font.size": 9,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.color": INK,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": SMALL,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "svg.hashsalt": "specd",  # the same picture has the same bytes
}


def require_matplotlib() -> None:
    """Raise ConfigError that names the package to install where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise missing_extra("matplotlib", "report") from None


def render(draw: Callable[[Figure], None], width: float, height: float, kind: Format) -> bytes:
    """The picture that `draw` makes on a fresh figure of width × height inches.

    Raises ConfigError where matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        out = io.BytesIO()
        figure.savefig(out, format=kind, dpi=150, facecolor="white", metadata={"Date": None} if kind == "svg" else {})
    return out.getvalue()
