"""What the charts of all benchmarks share: which files they can be written to, and the writing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from specd.bench import outputs
from specd.errors import ConfigError
from specd.report import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS: Final[dict[str, style.Format]] = {".png": "png", ".svg": "svg"}


def check(path: Path) -> None:
    """Raise ConfigError unless a chart can be written to `path`: before minutes are spent on measuring it."""
    if path.suffix not in KINDS:
        raise ConfigError(
            f"--chart {str(path)!r}: expected a file that ends in {' or '.join(KINDS)}, such as "
            f"{(path.stem or 'chart') + '.png'!r}; the figures themselves are what --json prints"
        )
    outputs.check("--chart", path)
    style.require_matplotlib()


def write(path: Path, draw: Callable[[Figure], None], width: float, height: float) -> None:
    """Write what `draw` makes on a figure of width × height inches. Raises ConfigError for a path `check` refuses."""
    check(path)
    outputs.write(path, style.render(draw, width, height, KINDS[path.suffix]))
