"""CURVE keys, and the files of this user that hold them.

A key is a Z85 text of 40 characters. A key file, `NAME.key`, holds the secret half of a pair on a line of its own, and
comments, `# …`.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

import zmq
from zmq.utils import z85

from specd.errors import ConfigError
from specd.paths import home_dir

KEY_CHARS = 40
MAX_FILE_BYTES = 1 << 20
_Z85 = re.compile(r"[0-9A-Za-z.:+=^!/*?&<>()\[\]{}@%$#-]{40}")
_PLAIN = re.compile(r"[0-9A-Za-z][0-9A-Za-z.:+=/@%-]{39}")
_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,63}")


class Pair(NamedTuple):
    """A key pair. The secret half is not shown."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"Pair(public={self.public!r})"


def draw() -> Pair:
    """A fresh pair."""
    public, secret = zmq.curve_keypair()
    return Pair(public.decode(), secret.decode())


def config_dir() -> Path:
    """Where this user's keys are: XDG_CONFIG_HOME/specd, or ~/.config/specd."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or home_dir("XDG_CONFIG_HOME") / ".config") / "specd"


def check_name(name: str) -> str:
    """`name` itself. Raises ConfigError for one that is no name; what may be a secret is not shown."""
    if not _NAME.fullmatch(name):
        said = "" if len(name) >= KEY_CHARS else f" {name!r}"
        raise ConfigError(f"the name{said} of a key: expected 1 to 64 letters, digits and . _ -, the first no sign")
    return name


def check_public(text: str, what: str = "public key") -> str:
    """`text` itself. Raises ConfigError that names `what` unless it is a public key."""
    if _Z85.fullmatch(text):
        with contextlib.suppress(Exception):  # five characters may stand for more than 32 bits
            z85.decode(text.encode())
            return text
    raise ConfigError(
        f"{what} {text[:60]!r} of {len(text)} characters: expected the {KEY_CHARS} that `specd keys new` printed"
    )


def create(name: str) -> tuple[Path, Pair]:
    """Make the pair `name` and write its secret half to `NAME.key`, mode 0600, in a directory of mode 0700.

    The public half needs no quotes in a shell or in YAML. Raises ConfigError where the file exists already, or cannot
    be written.
    """
    path = config_dir() / f"{check_name(name)}.key"
    pair = draw()
    while not _PLAIN.fullmatch(pair.public):  # some thousand times: less than a tenth of a second
        pair = draw()
    text = f"# specd: the secret key {name}, for this host alone. Its public half is {pair.public}\n{pair.secret}\n"
    try:
        make_directory(path.parent)
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        with open(file, "w", encoding="ascii") as out:
            out.write(text)
            out.flush()
            os.fsync(file)
    except FileExistsError:
        raise ConfigError(f"key {name!r} exists in {path}: choose another name, or remove that file first") from None
    except OSError as error:
        raise unwritable(path, error) from None
    return path, pair


def load(key: str) -> Pair:
    """The pair of a key, by name or by the path of its file.

    Raises ConfigError where there is none, others could read it, or it is no key. No message shows a secret.
    """
    if _Z85.fullmatch(key) and not Path(key).exists():  # which may have a / in it
        raise ConfigError("a key itself was given: expected its name or the path of its file; commands can be seen")
    named = not (os.sep in key or key.endswith(".key"))
    path = config_dir() / f"{check_name(key)}.key" if named else Path(os.path.expanduser(key))
    remedy = f"make it with `specd keys new {key}`" if named else "make one with `specd keys new NAME`"
    lines = [line for line in read_lines(path, "key file", 0o077, remedy) if not line.startswith("# ")]
    if len(lines) == 1 and _Z85.fullmatch(lines[0]):
        with contextlib.suppress(zmq.ZMQError, ValueError):
            return Pair(zmq.curve_public(lines[0].encode()).decode(), lines[0])
    raise ConfigError(f"key file {path} holds no key: expected one line of {KEY_CHARS} characters; {remedy}")


def own_keys() -> list[Path]:
    """The key files of this user, by name."""
    return sorted(path for path in config_dir().glob("*.key") if _NAME.fullmatch(path.stem))


def read_lines(path: Path, what: str, forbidden: int, remedy: str) -> list[str]:
    """The lines of a file that are not empty, stripped.

    Raises ConfigError that names `what` unless it is this user's, or root's, without a bit of mode `forbidden`.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            facts = os.fstat(file.fileno())
            data = file.read(MAX_FILE_BYTES) if stat.S_ISREG(facts.st_mode) else None
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error.strerror}; {remedy}") from error
    if data is None or len(data) == MAX_FILE_BYTES:
        raise ConfigError(f"{what} {path}: expected a regular file of less than {MAX_FILE_BYTES} bytes; {remedy}")
    if facts.st_uid not in (os.getuid(), 0) or facts.st_mode & forbidden:
        raise ConfigError(
            f"{what} {path} has mode {facts.st_mode & 0o777:o} and owner {facts.st_uid}: expected one that is "
            f"yours and that nobody else can {'read' if forbidden & 0o044 else 'write'}; chmod 600 it"
        )
    try:
        return [line.strip() for line in data.decode("ascii").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ConfigError(f"{what} {path} is no text; {remedy}") from None


def make_directory(path: Path) -> None:
    """Make this user's directory of keys, mode 0700. Raises ConfigError if it is open to others, else OSError."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = path.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise ConfigError(
            f"directory {path} has mode {facts.st_mode & 0o777:o} and owner {facts.st_uid}: keys need one of mode 700 "
            f"that is yours; chmod 700 it"
        )


def unwritable(path: Path, error: OSError) -> ConfigError:
    """The error for a file of keys that cannot be written."""
    return ConfigError(f"cannot write {path}: {error.strerror}; XDG_CONFIG_HOME names another directory for keys")
