"""The README of an exported draft: what it is, how it came to be, and the commands that serve it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from specd.config.presets import preset
from specd.version import __version__


def card(title: str, target: str, facts: Mapping[str, str], serving: Mapping[str, str], notes: Sequence[str]) -> bytes:
    """As Markdown. target: its name. facts: of the draft, as of Objective.facts. serving: engine -> command.

    notes: what else whoever serves it has to know.
    """
    about = f"For speculative decoding with this target alone. Trained by specd {__version__}."
    lines = [f"# {title} draft for {target}", "", about, ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items()), "", "## Serve", ""]
    lines += ["DRAFT is this directory.", ""]
    for engine, command in serving.items():
        lines += [f"{engine}:", "", f"    {command}", ""]
    lines += [f"- {note}" for note in notes]
    return ("\n".join(lines).rstrip() + "\n").encode()


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
    known = preset(target)
    return shlex.quote(known.hub if known and known.hub else target)
