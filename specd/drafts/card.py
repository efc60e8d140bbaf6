"""The README of an exported draft: what it is, how it came to be, and the commands that serve it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from specd.config.presets import preset
from specd.version import __version__

_HERE = "DRAFT is this directory."


def card(title: str, target: str, facts: Mapping[str, str], serving: Mapping[str, str], notes: Sequence[str]) -> bytes:
    """As Markdown, with the head that a hub reads. target: its name. facts: of the draft, as of Objective.facts.

    serving: engine, with the versions that serve it, -> command. notes: what else whoever serves it has to know.
    """
    about = f"For speculative decoding with this target alone. Trained by specd {__version__}."
    lines = [*_metadata(title, target), f"# {title} draft for {target}", "", about, ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items()), "", "## Serve", ""]
    lines += [_HERE, ""]
    for engine, command in serving.items():
        lines += [f"{engine}:", "", f"    {command}", ""]
    lines += [f"- {note}" for note in notes]
    return ("\n".join(lines).rstrip() + "\n").encode()


def with_section(readme: str, title: str, lines: Sequence[str]) -> str:
    """`readme` with that section as its last; one of the same title, and what is behind it, is replaced."""
    before = readme.partition(f"\n## {title}\n")[0].rstrip()
    return "\n".join([*([before, ""] if before else []), f"## {title}", "", *lines]).rstrip() + "\n"


def _metadata(title: str, target: str) -> list[str]:
    """The YAML head of a model card."""
    tags = ["speculative-decoding", title.lower().replace("-", "")]
    name = hub_name(target)
    base = [f"base_model: {name}"] if name else []
    return ["---", *base, "tags:", *(f"- {tag}" for tag in tags), "---", ""]


def published(readme: str, repository: str, old: str, target: str) -> str:
    """A README as it stands in a hub's repository, whose name engines take for the draft.

    old: the target's name until now; target: the repository that holds it.
    """
    text = readme.replace(f"{_HERE}\n\n", "").replace(shlex.quote(old), target).replace(old, target)
    if "\nbase_model: " not in text:
        text = text.replace("---\n", f"---\nbase_model: {target}\n", 1)
    return re.sub(r"\bDRAFT\b", repository, text)


def hub_name(target: str) -> str:
    """The repository that holds a target, empty for a directory or what else is not on a hub."""
    known = preset(target)
    if known:
        return known.hub
    return target if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", target) else ""


def sglang(target: str, options: str) -> str:
    """SGLang's command for a target with a draft."""
    return (
        f"python -m sglang.launch_server --model-path {_served(target)} --speculative-draft-model-path DRAFT {options}"
    )


def vllm(target: str, method: str, guesses: int) -> str:
    """vLLM's command for a target with a draft."""
    settings = f'{{"method": "{method}", "model": "DRAFT", "num_speculative_tokens": {guesses}}}'
    return f"vllm serve {_served(target)} --speculative-config '{settings}'"


def _served(target: str) -> str:
    """What engines call a target, for a shell: they do not know presets, but the repository that holds one."""
    return shlex.quote(hub_name(target) or target)
