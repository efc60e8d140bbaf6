"""`specd data`: regenerate answers with the target, show samples and their labels, count a data set."""

from __future__ import annotations

import typer

from specd.cli import regenerate, show, stats

EXAMPLES = (
    "Examples: `specd data stats chats.jsonl --model Qwen3-8B` · `specd data show chats.jsonl --row 3 --model Qwen3-8B`"
)

app = typer.Typer(help="Make, show and count training data.\n\n" + EXAMPLES, no_args_is_help=True)
app.command("regenerate", epilog=regenerate.EXAMPLES)(regenerate.regenerate)
app.command("show", epilog=show.EXAMPLES)(show.show)
app.command("stats", epilog=stats.EXAMPLES)(stats.stats)
