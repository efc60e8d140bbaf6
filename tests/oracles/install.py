"""Brings the Python files of the peers' wheels into a folder of their own: install.py FOLDER.

Their pins contradict ours and each other's, and most of their weight is GPU code: so nothing they depend on comes
along, and libraries are not unpacked.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PEERS = Path(__file__).with_name("peers.txt")
LEFT_OUT = (".so", ".cubin", ".cu")


def install(folder: Path) -> None:
    """Fill `folder` anew; it stands whole or not at all. Raises CalledProcessError where pip cannot get a wheel."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        wheels, site = Path(temporary, "wheels"), Path(temporary, "site")
        command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--only-binary=:all:", "-d", str(wheels), "-r", str(PEERS)], check=True)
        for wheel in wheels.iterdir():
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if not name.endswith(LEFT_OUT)]
                archive.extractall(site, names)
            wheel.unlink()
        shutil.copy(PEERS, site)
        shutil.rmtree(folder, ignore_errors=True)
        site.rename(folder)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if not (target / PEERS.name).is_file() or (target / PEERS.name).read_bytes() != PEERS.read_bytes():
        print(f"setting {target} up (once; 400 MB of wheels)", flush=True)
        try:
            install(target)
        except subprocess.CalledProcessError:
            sys.exit(f"pip cannot get the versions of {PEERS} for {sys.version.split()[0]}: the oracles cannot run")
