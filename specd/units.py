"""Human-readable sizes and times, and texts of others made safe to show."""

from __future__ import annotations


def size(nbytes: float) -> str:
    """Bytes as 17 B, 640 KiB, 1.5 GiB: binary units, one decimal unless it is 0."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while abs(nbytes) >= 1024 and power < len(units) - 1:
        nbytes /= 1024
        power += 1
    return f"{nbytes:.1f}".removesuffix(".0") + f" {units[power]}"


def duration(seconds: float) -> str:
    """Seconds as 46 µs, 7.5 ms, 2.0 s, 1 min 20 s, 3 h 05 min: three figures below a second."""
    if (us := 1e6 * seconds) < 999.5:
        return f"{us:.3g} µs"
    if (ms := 1e3 * seconds) < 999.5:
        return f"{ms:.3g} ms"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def printable(text: str) -> str:
    """A peer's text, safe for a terminal and a log: control and format characters and line ends are replaced."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
