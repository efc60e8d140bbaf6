"""Tests lie where their module lies: a module of some size has a test file of its name in the folder of its package."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("specd", "transports", "cli", "bench")
LEAST = 80
"""Lines from which a module has a test of its name."""
EXCEPTIONS = {
    "specd/client/effects.py": "structs; tests/client/test_window.py looks at what the window returns",
    "specd/daemon/slots.py": "records of the ring; tests/daemon/test_ring.py and its siblings",
    "specd/drafts/base.py": "contracts; specd/drafts/suite.py holds drafts to them",
    "specd/drafts/head_kernel.py": "runs on GPUs; tests/drafts/test_head.py",
    "specd/worker/messages.py": "structs between control and worker; tests/worker and tests/daemon send all of them",
}
"""Modules without one, and where they are tested instead; at most 20, and the fewer the better."""


def modules() -> list[Path]:
    """All modules of LEAST lines or more, without those behind the links specd/{transports,cli,bench,configs}."""
    found = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py") if path.resolve() == path]
    return sorted(path for path in found if len(path.read_text(encoding="utf-8").splitlines()) >= LEAST)


def homes_of(module: Path) -> list[Path]:
    """Its test files: tests/PACKAGE/test_NAME.py or test_NAME_*.py.

    What lies in a package of one noun, as `nccl/`, may be tested one folder higher, under that noun or its own name.
    """
    package = module.parent.relative_to(ROOT)
    folder = ROOT / "tests" / (package.relative_to("specd") if package.parts[0] == "specd" else package)
    places = [(folder, module.stem), (folder.parent, folder.name), (folder.parent, module.stem)]
    return [path for place, name in places for form in (name, f"{name}_*") for path in place.glob(f"test_{form}.py")]


def test_every_module_of_some_size_has_a_test_of_its_name() -> None:
    found = modules()
    assert len(found) > 60
    alone = {str(module.relative_to(ROOT)) for module in found if not homes_of(module)}
    assert alone - EXCEPTIONS.keys() == set(), "write tests/PACKAGE/test_NAME.py, or say above where it is tested"
    assert EXCEPTIONS.keys() - alone == set(), "these have a test of their name now"
    assert len(EXCEPTIONS) <= 20
