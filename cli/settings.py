"""Settings from the command line: flags, files and `--set` on top of a preset's recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from specd.config.load import convert, merge, overrides
from specd.config.presets import presets, recipe_of
from specd.config.settings import DaemonConfig, DataConfig, RunConfig, TrainerAuth
from specd.data.rows import DEMO
from specd.drafts import registry
from specd.errors import ConfigError
from specd.protocol.capture import FP8
from specd.protocol.limits import MAX_PAYLOAD_BYTES
from specd.targets import registry as targets

if TYPE_CHECKING:
    from specd.client.line import Identity


def complete_preset(incomplete: str) -> list[str]:
    """Presets that begin so, for the shell."""
    return [name for name in presets() if name.startswith(incomplete)]


def complete_method(incomplete: str) -> list[str]:
    """Draft methods that begin so, for the shell."""
    return [name for name in registry.names() if name.startswith(incomplete)]


Key = Annotated[str, typer.Option("--key", help="Over TCP: the key to be known by, by name or path.")]
ServerKey = Annotated[str, typer.Option("--server-key", help="Over TCP: the daemon's public key.", metavar="PUBLIC")]
Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="The target: preset, local directory or hub name.", autocompletion=complete_preset
    ),
]

DATA = "File, folder, glob or hub name; else the recipe's, or what comes with specd."
"""What may be given as data, where a command reads some."""
Data = Annotated[list[str] | None, typer.Option("--data", help=f"{DATA} Give it again for more.", metavar="FILE")]
Files = Annotated[list[str] | None, typer.Argument(metavar="FILE", help="The same as --data.", show_default=False)]
DataSettings = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting of the data section, as data.max_length=512.")
]
Method = Annotated[
    str,
    typer.Option("--method", help="The draft whose training the samples are for.", autocompletion=complete_method),
]
Preset = Annotated[
    str,
    typer.Option("--preset", help="Take this preset's recipe; else the target's own.", autocompletion=complete_preset),
]
Prompts = Annotated[list[str] | None, typer.Option("--prompts", "-p", hidden=True, help="The same as --data.")]

TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the target, of which some consist."),
]


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """Drop flags that were not given: None, empty texts and lists, and mappings of only those."""
    kept = {key: given(value) if isinstance(value, dict) else value for key, value in flags.items()}
    return {key: value for key, value in kept.items() if value is not None and value not in ("", [], {})}


def daemon_config(
    file: dict[str, Any], flags: dict[str, Any], settings: list[str], *, preset: str = "", where: str = "specd start"
) -> DaemonConfig:
    """A DaemonConfig from, weakest first: the recipe of `preset` or else the model's own, a file, flags, `--set`.

    Raises ConfigError that names `where` and the key at fault, or when no model is given.
    """
    asked = merge(merge(file, flags), overrides(settings))
    target = asked.get("target")
    model = target.get("model") if isinstance(target, dict) else None
    recipe = recipe_of(preset, needed(str(model or "")))
    names = ("target", "capture", "ring")
    under: dict[str, Any] = {name: getattr(recipe, name) for name in names} if recipe else {}
    found = convert(merge(under, asked), DaemonConfig, where)
    if found.target.backend not in ("auto", *targets.names()):
        known = ", ".join(targets.names())
        raise ConfigError(f"{where}: target.backend={found.target.backend!r}: expected auto or one of {known}")
    _check_exact(found, found.capture.dtype, where)
    return found


def servers_of(endpoints: Sequence[str], public: Sequence[str]) -> dict[str, str]:
    """The key of the daemon at each endpoint: one a TCP endpoint, in order, or one for all. Raises ConfigError."""
    far = [endpoint for endpoint in endpoints if endpoint.startswith("tcp://")]
    if public and not (far and len(public) in (1, len(far))):
        raise ConfigError(
            f"{len(public)} × --server-key for {len(far)} TCP endpoints: expected one for each --endpoint tcp://…, in "
            f"their order, or one that all have"
        )
    return dict(zip(far, [*public] * (len(far) if len(public) == 1 else 1), strict=True)) if public else {}


def asker(endpoint: str, key: str, server_key: str) -> Identity | None:
    """Who asks a daemon, as the flags say, None without keys. Raises ConfigError for keys that cannot be used."""
    from specd.client.line import identity

    if not key:
        if server_key:
            raise ConfigError("--server-key is given without --key: expected both, or neither")
        return None
    servers = servers_of([endpoint], [server_key] if server_key else [])
    return identity(TrainerAuth(key=key, servers=servers), [endpoint])


def hosting_config(run: RunConfig, model: str, *, preset: str = "") -> DaemonConfig:
    """The DaemonConfig to host `model` in the trainer's process, its ring sized for the run.

    Raises ConfigError that names the key at fault.
    """
    if (other := run.target.get("model", model)) != model:
        raise ConfigError(f"settings: target.model={other!r}: expected {model!r}, as given by --model; leave it out")
    draft = registry.settings(run.method, run.draft, "settings")
    capture = registry.load(run.method).capture_config(draft)
    # Whoever decodes has a session of the target's dtype, too.
    dtype = capture.dtype if run.capture.dtype == "auto" or run.sessions > 1 else run.capture.dtype
    settings = {
        "target": {"device": run.train.device} | run.target | {"model": model},
        "capture": {"num_taps": capture.num_taps, "final": capture.final, "dtype": dtype},
        "ring": {
            "slots": run.subscriber.depth + 1 + run.sessions,
            "slot_tokens": run.data.batch_tokens,
            "max_sessions": run.sessions,
            "payload_mib": MAX_PAYLOAD_BYTES >> 20,  # nobody else asks this daemon
        },
    }
    found = daemon_config({}, settings, [], preset=preset, where="settings")
    _check_exact(found, run.capture.dtype, "settings")
    return found


def _check_exact(config: DaemonConfig, dtype: str, where: str) -> None:
    """Raise ConfigError where an exact target is to give rounded states."""
    if config.target.exact and dtype == FP8:
        raise ConfigError(
            f"{where}: capture.dtype={dtype} with target.exact=true: states in it are rounded, expected those of a "
            f"local run to the bit; leave one of them out"
        )


def needed(model: str) -> str:
    """`model` itself. Raises ConfigError when none was given, and names the presets."""
    if not model:
        raise ConfigError(
            f"no target given: expected --model with a preset ({', '.join(presets())}), a local directory or a hub name"
        )
    return model


def named(*given: Sequence[str] | None) -> tuple[str, ...]:
    """All data that a command line names, in order, whichever way: by --data or as an argument."""
    return tuple(path for paths in given for path in paths or ())


def data_config(
    files: Sequence[str],
    model: str,
    settings: list[str] | None,
    *,
    method: str = registry.DEFAULT,
    preset: str = "",
    run: dict[str, Any] | None = None,
) -> DataConfig:
    """The data section: that of a run or else the recipe's for `method`, then the files, then `--set`.

    Where nothing names data, as in training, it is the conversations that come with specd.
    Raises ConfigError that names the key at fault.
    """
    recipe = recipe_of(preset, model)
    asked = overrides([text if text.startswith("data.") else f"data.{text}" for text in settings or []])
    own = recipe.run.get(method, {}).get("data", {}) if recipe else {}
    config = convert(merge(merge(own if run is None else run, paths(files)), asked.get("data", {})), DataConfig, "data")
    return config if config.path else msgspec.structs.replace(config, path=DEMO)


def paths(files: Sequence[str]) -> dict[str, Any]:
    """The settings of the data section that `files` stand for."""
    return {"path": files[0] if len(files) == 1 else list(files)} if files else {}


def tokenizer_dir(model: str) -> Path:
    """The directory of the tokenizer of `model`, whose weights need not be here. Raises as `targets.source.resolve`."""
    from specd.targets.source import resolve

    path = resolve(model, need="tokenizer").path
    assert path is not None, "only a shape can come without a directory"
    return path
