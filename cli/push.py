"""`specd push`: a draft to a repository of a model hub, with its card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specd.drafts import registry
from specd.errors import ConfigError, SpecdError, first_line

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

    from specd.train.export import Found

EXAMPLES = (
    f"Examples: `specd push runs/{registry.DEFAULT} me/my-draft --private` · "
    "`specd push drafts/first me/my-draft --base Qwen/Qwen3-8B`"
)
KEPT_HOME = (".", "eval")
"""How the names of files begin that are not published."""


def push(
    source: Annotated[Path, typer.Argument(metavar="DRAFT", help="A draft's directory, a run or a checkpoint.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository; made if it is missing.")],
    private: Annotated[bool, typer.Option("--private/--public", help="Who may see it, if it is made.")] = True,
    base: Annotated[
        str, typer.Option("--base", help="The target's repository, where it was trained from a directory.")
    ] = "",
    revision: Annotated[str, typer.Option(help="The branch to push to; it has to be there.")] = "main",
    message: Annotated[str, typer.Option("--message", help="Of the commit; else the step.", show_default=False)] = "",
) -> None:
    """Push a draft to a model hub: its weights, the target's tokenizer, and a model card that says how it is served.

    You are who `hf auth login` or HF_TOKEN say; HF_ENDPOINT names another hub. What is there is replaced file by file,
    in one commit. No path of this machine is published: a target that is a directory here has to be named by --base.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    from specd.train.export import find, refresh

    found = find(source)
    refresh(found)
    operations = _operations(found, repository, base)
    step = f" at step {found.facts.step}" if found.facts else ""
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.create_commit(
            repository, operations, commit_message=message or f"Draft{step}", revision=revision, num_threads=2
        )
    except HFValidationError as error:
        raise ConfigError(f"repository {repository!r}: {first_line(error)}; expected OWNER/NAME") from None
    except LocalTokenNotFoundError as error:
        raise ConfigError(f"{first_line(error)}: log in with `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ConfigError(
                f"the hub does not let you write to {repository!r} ({status}): log in with `hf auth login` or set "
                f"HF_TOKEN, with a token that may write there"
            ) from None
        raise SpecdError(
            f"the hub refused {repository!r}, nothing was pushed: {first_line(error)}; see that "
            f"--revision {revision} is there"
        ) from None
    except (OSError, OfflineModeIsEnabled) as error:
        raise SpecdError(f"the hub cannot be reached, nothing was pushed: {first_line(error)}; try again") from None
    except Exception as error:  # httpx's own errors share no base class with those of the hub
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpcore"):
            raise
        raise SpecdError(f"the hub cannot be reached, nothing was pushed: {first_line(error)}; try again") from None
    typer.echo(f"{found.directory} pushed to {done.repo_url}, revision {done.oid}")


def _operations(found: Found, repository: str, base: str) -> list[CommitOperationAdd]:
    """What is to be committed. Raises ConfigError where the target has no name that others know."""
    import msgspec
    from huggingface_hub import CommitOperationAdd

    from specd.drafts.card import hub_name, published
    from specd.train.export import PROVENANCE, README, run_facts

    facts = run_facts(found)
    model = str(facts.target.get("model", "")) if facts else ""
    target = base or hub_name(model)
    if not hub_name(target):
        whose = f"the draft's target is {model!r}, which nobody else has" if model else "the draft names no target"
        raise ConfigError(f"{whose}: give --base OWNER/NAME with the repository of the target")
    changed: dict[str, bytes] = {}
    readme = found.directory / README
    if readme.is_file():
        changed[README] = published(readme.read_text(encoding="utf-8"), repository, model or target, target).encode()
    if (said := found.facts) is not None:
        config = {**said.config, "target": {**said.config.get("target", {}), "model": target, "tokenizer": ""}}
        said = msgspec.structs.replace(said, target=said.target | {"model": target}, config=config)
        changed[PROVENANCE] = msgspec.json.format(msgspec.json.encode(said), indent=1) + b"\n"
    names = sorted(
        str(file.relative_to(found.directory))
        for file in found.directory.rglob("*")
        if file.is_file() and not file.name.startswith(KEPT_HOME)
    )
    return [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=changed.get(name, found.directory / name))
        for name in names
    ]
