"""`specd config`: every setting with its meaning: the defaults, a preset's recipe, or those of a run."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec
import typer
import yaml

from specd.config.describe import meanings, section_of, summary
from specd.config.load import as_begun, convert, load_yaml, merge
from specd.config.presets import recipe_of, run_config
from specd.config.settings import DaemonConfig, RunConfig, TargetConfig
from specd.drafts import registry
from specd.errors import ConfigError

EXAMPLES = (
    "Examples: `specd config --defaults > run.yaml` · `specd config --preset Qwen3-8B --method eagle3` · "
    f"`specd config --run runs/{registry.DEFAULT}` · `specd config --defaults --daemon`"
)
WIDTH = 80
END = "...\n"
"""What YAML puts behind a plain value."""


def config(
    defaults: Annotated[bool, typer.Option("--defaults", help="As they are when nothing is said.")] = False,
    preset: Annotated[str, typer.Option("--preset", help="The recipe of this preset.")] = "",
    run: Annotated[Path | None, typer.Option("--run", help="Those of this run.", metavar="RUN")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help=f"Which draft: {', '.join(registry.BUILTIN)}, or a plug-in's; {registry.DEFAULT} unless said.",
        ),
    ] = None,
    daemon: Annotated[bool, typer.Option("--daemon", help="Those of `specd start` in place of `specd train`.")] = False,
    reference: Annotated[
        bool, typer.Option("--reference", help="All settings of daemons and drafts as a page of Markdown.")
    ] = False,
) -> None:
    """Print settings as YAML that `--config FILE` takes, each with what it means."""
    if sum((defaults, bool(preset), run is not None, reference)) != 1:
        raise ConfigError("expected one of --defaults, --preset NAME, --run RUN and --reference")
    fixed = {"--run": run is not None, "--daemon": daemon, "--reference": reference}
    if method and (other := next((option for option, given in fixed.items() if given), "")):
        raise ConfigError(
            f"--method {method} with {other}: a run has the draft that it trains, a daemon none, the reference all; "
            f"leave one out"
        )
    if reference:
        typer.echo(page(), nl=False)
    elif daemon:
        if run is not None:
            raise ConfigError("--daemon with --run: a run does not know the settings of its daemon; leave one out")
        recipe = recipe_of(preset, "")
        under = {name: getattr(recipe, name) for name in ("target", "capture", "ring")} if recipe else {}
        known = convert(merge(under, {"target": {"model": preset or "MODEL"}}), DaemonConfig, f"preset {preset}")
        typer.echo("\n".join(_lines(msgspec.to_builtins(known), DaemonConfig)))
    elif run is not None:
        from specd.train.directory import read_facts

        typer.echo(as_yaml(convert(read_facts(run).config, RunConfig, "run.json")), nl=False)
    else:
        typer.echo(as_yaml(run_config({"method": method or registry.DEFAULT}, "", preset=preset)), nl=False)


def run_file(path: Path) -> dict[str, Any]:
    """The settings in a file of a run: YAML, or a run.json, whose output another run does not take."""
    found = load_yaml(path)
    if "started" in found and isinstance(found.get("config"), dict):
        found = {key: value for key, value in as_begun(found["config"]).items() if key != "output"}
    if not isinstance(found.get("target", {}), dict):
        raise ConfigError(f"config file {str(path)!r}: target is {found['target']!r}: expected settings of a target")
    return found


def as_yaml(run: RunConfig) -> str:
    """The settings of a run, with those of its draft, as YAML that reads back as the same."""
    draft = registry.settings(run.method, run.draft, "settings")
    data = msgspec.to_builtins(run) | {"draft": msgspec.to_builtins(draft)}
    return "\n".join(_lines(data, RunConfig, {"draft": type(draft)})) + "\n"


def _lines(
    data: Mapping[str, Any],
    kind: type[msgspec.Struct],
    sections: Mapping[str, type[msgspec.Struct]] | None = None,
    indent: str = "",
) -> Iterator[str]:
    """YAML with a comment for each setting. sections: structs of fields that are plain mappings in `kind`."""
    for field in msgspec.structs.fields(kind):
        value = data[field.encode_name]
        inner = (sections or {}).get(field.name) or section_of(field.type)
        meaning = meanings(kind).get(field.name, "")
        if inner is not None and isinstance(value, Mapping):
            yield f"{indent}{field.encode_name}:  # {summary(inner).rstrip('.')}"
            yield from _lines(value, inner, None, indent + "  ")
            continue
        yield from textwrap.wrap(meaning, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        shown = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True, sort_keys=False)
        yield f"{indent}{field.encode_name}: {shown.removesuffix(END).strip()}"


def page() -> str:
    """The reference of all settings, as docs/settings.md has it."""
    parts = [
        "# Settings",
        "",
        "All that `specd train` and `specd start` can be told, by `--set SETTING=VALUE` or in a file for `--config`.",
        "Weakest first: the defaults below, the recipe of the target's preset, `--config`, flags, `--set`.",
        "`specd config` prints them for a preset or a run; this page is `specd config --reference`.",
        "",
        "## specd train METHOD",
        "",
        *_table(RunConfig, "", skip=("draft", "target")),
    ]
    for name in registry.BUILTIN:
        settings = registry.load(name).settings
        parts += ["", f"## draft, of {name}", "", summary(settings), "", *_table(settings, "draft.")]
    parts += [
        "",
        "## target",
        "",
        "Of `specd start`, and of `specd train --model`.",
        "",
        *_table(TargetConfig, "target."),
    ]
    parts += ["", "## specd start", "", *_table(DaemonConfig, "", skip=("target",))]
    return "\n".join(parts) + "\n"


def _table(kind: type[msgspec.Struct], at: str, skip: tuple[str, ...] = ()) -> Iterator[str]:
    yield "| setting | default | |"
    yield "|---|---|---|"
    yield from _rows(kind, at, skip)


def _rows(kind: type[msgspec.Struct], at: str, skip: tuple[str, ...] = ()) -> Iterator[str]:
    for field in msgspec.structs.fields(kind):
        inner = section_of(field.type)
        if field.name in skip:
            continue
        if inner is not None:
            yield from _rows(inner, f"{at}{field.encode_name}.")
            continue
        words = [f"`{word}`" for word in get_args(field.type) if isinstance(word, str)]
        choice = f" One of {', '.join(words)}." if words else ""
        meaning = meanings(kind).get(field.name, "").replace("|", "\\|")
        yield f"| `{at}{field.encode_name}` | {_default(field)} | {meaning}.{choice} |"


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "none"
    value = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    plain = msgspec.to_builtins(value)
    return "" if plain in ("", [], {}, None) else f"`{msgspec.json.encode(plain).decode()}`".replace('"', "")
