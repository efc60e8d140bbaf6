"""`specd keys`: make a key for a daemon or a trainer, and say whose keys a daemon lets in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from specd.curve import authorized, keys
from specd.errors import ConfigError

app = typer.Typer(
    help="Keys of daemons and trainers, for training over TCP; docs/security.md goes through it.",
    no_args_is_help=True,
)
File = Annotated[str, typer.Option("--authorized", help="Another file than this user's own.", metavar="PATH")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="1 to 64 letters, digits and . _ -")]


@app.command("new", epilog="Example: `specd keys new trainer1`")
def new(name: Name) -> None:
    """Make a key for this host, and print its public half.

    The secret half stays in NAME.key among this user's keys; the public half is for the other side.
    """
    path, pair = keys.create(name)
    typer.echo(f"secret half in {path}; public half, to be given to the other side:", err=True)
    typer.echo(pair.public)


@app.command("allow", epilog="Example: `specd keys allow trainer1 $(ssh trainer1 specd keys new trainer1)`")
def allow(
    name: Name,
    public: Annotated[str, typer.Argument(metavar="PUBLIC", help="What `specd keys new` printed there.")],
    file: File = "",
) -> None:
    """Let the trainer that holds a key in, at the daemons of this user; those that run know at once."""
    path = authorized.authorized_path(file)
    added = authorized.allow(path, name, public)
    typer.echo(f"{name} is let in{'' if added else ' already'}, by {path}")


@app.command("revoke", epilog="Example: `specd keys revoke trainer1`")
def revoke(name: Name, file: File = "") -> None:
    """Let a trainer in no more; its sessions end within a second."""
    path = authorized.authorized_path(file)
    authorized.revoke(path, name)
    typer.echo(f"{name} is not let in any more, by {path}")


@app.command("list", epilog="Examples: `specd keys list` · `specd keys list --json`")
def show(
    file: File = "", as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False
) -> None:
    """List the keys of this user, and those that its daemons let in: name and public half, a line each."""
    path = authorized.authorized_path(file)
    own = {each.stem: _public(each) for each in keys.own_keys()}
    known, problems = authorized.read(path) if path.exists() else ({}, [])
    let_in = {name: public for public, name in known.items()}
    if as_json:
        found: dict[str, Any] = {"own": own, "let_in": let_in, "authorized": str(path), "problems": problems}
        typer.echo(json.dumps(found, indent=2))
        return
    for title, table in (("own", own), ("lets in", let_in)):
        for name, public in sorted(table.items()):
            typer.echo(f"{title}\t{name}\t{public}")
    for problem in problems:
        typer.echo(f"specd: {problem}", err=True)
    if not own and not let_in:
        typer.echo("no keys yet: `specd keys new NAME` makes one", err=True)


def _public(path: Path) -> str:
    """The public half of a key file, or why there is none."""
    try:
        return keys.load(str(path)).public
    except ConfigError as error:
        return f"unusable: {error}"
