"""Importing specd does nothing: no torch, no environment, no logging; the control plane needs no torch at all."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import specd

TORCH_FREE = (
    "specd",
    "specd.cli.main",
    "specd.client.ask",
    "specd.client.handshake",
    "specd.client.line",
    "specd.client.watch",
    "specd.client.window",
    "specd.config.load",
    "specd.config.presets",
    "specd.config.settings",
    "specd.curve.authorized",
    "specd.curve.keys",
    "specd.curve.zap",
    "specd.daemon.control",
    "specd.daemon.exporter",
    "specd.daemon.gate",
    "specd.daemon.ring",
    "specd.daemon.serve",
    "specd.daemon.supervisor",
    "specd.drafts.registry",
    "specd.endpoints",
    "specd.errors",
    "specd.memory.arena",
    "specd.memory.cuda",
    "specd.memory.device_arena",
    "specd.memory.segment",
    "specd.metrics",
    "specd.paths",
    "specd.plan.balance",
    "specd.plan.replay",
    "specd.plugins",
    "specd.protocol.batch",
    "specd.protocol.capture",
    "specd.protocol.contract",
    "specd.protocol.messages",
    "specd.scrape",
    "specd.targets.registry",
    "specd.transports.base",
    "specd.transports.checks",
    "specd.transports.registry",
    "specd.version",
    "specd.worker.messages",
    "specd.worker.ring_memory",
)
HEAVY = ("torch", "transformers", "cupy", "datasets", "tensorboard", "matplotlib", "sglang")

PROBE = """
import json, logging, os, sys, threading
reads = []
plain = os._Environ.__getitem__
def watched(self, key):
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__") in ("os", "_collections_abc"):
        frame = frame.f_back
    if str(frame.f_globals.get("__name__")).startswith("specd"):
        reads.append(f"{frame.f_globals['__name__']}: {key}")
    return plain(self, key)
os._Environ.__getitem__ = watched
handlers = len(logging.root.handlers)
import importlib
importlib.import_module(sys.argv[1])
print(json.dumps({
    "modules": sorted(name for name in sys.modules if "." not in name),
    "reads": reads,
    "handlers": len(logging.root.handlers) - handlers + len(logging.getLogger("specd").handlers),
    "threads": threading.active_count(),
}))
"""
TIMER = """
import sys, time
import msgspec
began = time.perf_counter()
import specd
print(time.perf_counter() - began)
"""


def python(code: str, *arguments: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", TORCH_FREE)
def test_import_does_nothing(module: str) -> None:
    seen = json.loads(python(PROBE, module))
    assert [name for name in HEAVY if name in seen["modules"]] == []
    assert seen["reads"] == []
    assert seen["handlers"] == 0
    assert seen["threads"] == 1


def test_import_specd_is_quick() -> None:
    assert min(float(python(TIMER)) for _ in range(3)) < 0.1


def test_public_names() -> None:
    assert len(specd.__all__) <= 20
    assert specd.__all__ == sorted(specd.__all__)
    assert dir(specd) == specd.__all__
    missing = [name for name in specd.__all__ if not hasattr(specd, name)]
    assert missing == []


def test_unknown_name_is_an_attribute_error() -> None:
    name = "Subscribr"
    with pytest.raises(AttributeError, match="'specd' has no attribute 'Subscribr'"):
        getattr(specd, name)


def test_star_import_gives_the_public_names() -> None:
    namespace: dict[str, object] = {}
    exec("from specd import *", namespace)
    assert set(specd.__all__) <= namespace.keys()
