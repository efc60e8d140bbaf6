"""Pages of metrics as Prometheus reads them, and promtool's rules on names (client_golang's promlint)."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

NOT_BASE = {
    "ms", "us", "ns", "milliseconds", "microseconds", "nanoseconds", "minutes", "hours", "days", "kb", "kib", "mb",
    "mib", "gb", "gib", "kilobytes", "megabytes", "gigabytes", "bits", "percent", "celcius",
}  # fmt: skip
TYPES = {"counter", "gauge", "histogram", "summary", "untyped"}


def page_of(metrics: Iterable[Metric]) -> str:
    """The page that Prometheus would be given."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Given(list(metrics)))
    return generate_latest(registry).decode()


class _Given:
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


def samples(page: str) -> dict[str, float]:
    """Every sample of a page, by its name and sorted labels."""
    found = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def lint(page: str) -> list[str]:
    """What promtool would say of a page's names."""
    return [problem for name, kind, text in _families(page) for problem in _problems(name, kind, text)]


def promtool(page: str) -> list[str]:
    """What promtool itself says of a page, where it is installed (Debian's package prometheus)."""
    if (program := shutil.which("promtool")) is None:
        return []
    done = subprocess.run([program, "check", "metrics"], input=page, capture_output=True, text=True, check=False)
    return [*done.stdout.splitlines(), *done.stderr.splitlines()]


def served(daemon: subprocess.Popen[str]) -> str:
    """The address of its page, once a `specd start --metrics` whose output and errors are pipes is ready."""
    assert daemon.stdout is not None
    assert daemon.stderr is not None
    url = next(line.split(" at ")[1].strip() for line in daemon.stderr if "metrics at http" in line)
    assert "ready" in daemon.stdout.readline()
    return url


def _families(page: str) -> Iterator[tuple[str, str, str]]:
    """Name, type and help of each family, as its lines have them."""
    helps = dict(re.findall(r"^# HELP (\S+) ?(.*)$", page, re.MULTILINE))
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE):
        yield name, kind, helps.get(name, "")


def _problems(name: str, kind: str, text: str) -> Iterator[str]:
    words = name.split("_")
    if not text:
        yield f"{name}: no help"
    if kind == "counter" and not name.endswith("_total"):
        yield f"{name}: a counter ends in _total"
    if kind != "counter" and name.endswith("_total"):
        yield f"{name}: only counters end in _total"
    if kind not in ("histogram", "summary") and words[-1] in ("count", "sum", "bucket"):
        yield f"{name}: only histograms and summaries end in _{words[-1]}"
    for word in words:
        if word in NOT_BASE:
            yield f"{name}: {word} is no base unit"
        if word in TYPES:
            yield f"{name}: its type is in its name"
    if ":" in name or re.search(r"[a-z][A-Z]", name):
        yield f"{name}: expected snake_case without colons"
