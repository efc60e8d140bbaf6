"""A transport from another package: found by its entry point, held to the same suite, chosen like any other."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specd.errors import TransportError
from specd.transports.base import SlotRef, Transport
from specd.transports.registry import BUILTIN, choose, known, load, names
from specd.transports.testing.hosts import Host, LocalHost
from specd.transports.testing.spawned import SpawnedHost
from specd.transports.testing.suite import Rig, TransportConformance, holds

PLUGIN = Path(__file__).parents[1] / "plugin"
TEXT = Path(__file__).parents[2] / "docs" / "plugins.md"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What `pip install` of the plug-in leaves for `importlib.metadata`: its metadata, and the package on the path."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    site = tmp_path_factory.mktemp("site")
    info = site / f"specd_carrier-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    entries = [
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in found.items())
        for group, found in project["entry-points"].items()
    ]
    broken = "lost = specd_carrier.nowhere:Lost\nodd = specd_carrier:os\n"
    (info / "entry_points.txt").write_text("".join(entries) + broken)
    sys.path[:0] = [str(site), str(PLUGIN)]
    yield site
    sys.path[:] = [path for path in sys.path if path not in (str(site), str(PLUGIN))]
    sys.modules.pop("specd_carrier", None)


@pytest.mark.usefixtures("installed")
class TestCarrier(TransportConformance):
    @pytest.fixture(autouse=True)
    def _transport(self, installed: Path) -> None:
        type(self).transport = load("carrier")

    def host(self) -> Host:
        return LocalHost(self.transport, self.num_slots, self.slot_bytes)


def test_it_is_known_by_its_entry_point_only(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names() == [*BUILTIN, "carrier", "lost", "odd"]
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(installed)])
    assert "carrier" not in names()
    with pytest.raises(TransportError, match=f"unknown transport 'carrier'; known here: {', '.join(BUILTIN)}"):
        load("carrier")


@pytest.mark.usefixtures("installed")
def test_a_broken_plugin_says_what_failed() -> None:
    with pytest.raises(TransportError, match=r"'lost' cannot be imported: .*specd_carrier\.nowhere"):
        load("lost")
    with pytest.raises(TransportError, match=r"'odd' is .*expected a class with traits"):
        load("odd")


@pytest.mark.usefixtures("installed")
def test_it_serves_from_another_process() -> None:
    carrier: type[Transport] = load("carrier")
    rig = Rig(carrier, "cpu", SpawnedHost("carrier", 2, 100_000))
    try:
        client = rig.attach()
        rig.host.fill(1, 5, b"bird", 100_000)
        assert holds(rig.fetch(client, SlotRef(1, 5, 100_000)), b"bird")
    finally:
        rig.close()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_auto_takes_it_after_the_built_in_ones(device: str) -> None:
    offered = ("carrier", "bytes")
    traits = known(offered)
    assert traits["carrier"].rank is None
    assert choose("auto", offered, traits, False, device, lambda name: None).name == "bytes"
    only = choose("auto", offered, traits, False, device, lambda name: None if name == "carrier" else "broken")
    assert only.name == "carrier"
    assert choose("carrier", offered, traits, False, device, lambda name: None).name == "carrier"


@pytest.mark.usefixtures("installed")
def test_the_text_shows_the_plugin_as_it_is() -> None:
    section = TEXT.read_text().partition("\n## A transport\n")[2].partition("\n## ")[0]
    source = (PLUGIN / "specd_carrier" / "__init__.py").read_text() + (PLUGIN / "pyproject.toml").read_text()
    *shown, suite = re.findall(r"^```(?:python|toml)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert len(shown) == 3
    assert [block for block in shown if block not in source] == []
    namespace: dict[str, Any] = {}
    exec(suite, namespace)
    assert issubclass(namespace["TestCarrier"], TransportConformance)
    assert namespace["TestCarrier"].transport is load("carrier")
    ranks = {name: traits.rank for name, traits in known(()).items()}
    assert ", ".join(f"{name} {rank}" for name, rank in ranks.items()) in " ".join(section.split())
