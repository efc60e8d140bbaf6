"""Models and tokenizers of transformers, from a checkpoint or with dummy weights."""

from __future__ import annotations

import json
import logging
import zlib
from typing import TYPE_CHECKING, Any, Literal

from specd.errors import ConfigError, TargetError, first_line
from specd.targets.digest import DUMMY_SEED
from specd.targets.quiet import no_bars
from specd.targets.source import TOKENIZERS, Source, dummy_config, pick_device, pick_dtype, resolve

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_causal_lm(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    load_format: Literal["auto", "dummy"] = "auto",
    num_layers: int = 0,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The causal LM called `model` in eval mode without gradients, and its tokenizer if it has one.

    dtype: `auto` is the preset's, else the checkpoint's. device: `auto` is cuda where there is one.
    load_format: `dummy` needs config.json alone and draws normal(0, 0.02) weights from a fixed seed, the same for
    every depth. num_layers: keeps the first layers only (dummy weights). trust_remote_code: runs Python code that comes
    with the checkpoint, of which some models consist. A model with images is loaded whole; its language model is one.
    Block-quantised FP8 weights are expanded to `dtype`, because transformers gets its FP8 kernels from a hub at run
    time.
    Raises ConfigError for an impossible request, TargetError when the checkpoint cannot be loaded.
    """
    source = resolve(model, need="shape" if load_format == "dummy" else "weights", code=trust_remote_code)
    network = load_network(
        source,
        dtype=dtype,
        device=device,
        load_format=load_format,
        num_layers=num_layers,
        trust_remote_code=trust_remote_code,
    )
    return network, _read_tokenizer(source, trust_remote_code) if _has_tokenizer(source) else None


def load_network(
    source: Source, *, dtype: str, device: str, load_format: str, num_layers: int, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal LM of a resolved `source`; arguments and errors as `load_causal_lm`."""
    if num_layers and load_format != "dummy":
        raise ConfigError(
            f"num_layers={num_layers}: real weights keep all their layers; leave it 0 or use --load-format dummy"
        )
    place, kind = pick_device(device), pick_dtype(dtype, source)
    if load_format == "dummy":
        network = _dummy_model(dummy_config(source, num_layers), kind, place)
    else:
        network = _read_model(source, kind, trust_remote_code)
    network.to(place)  # type: ignore[arg-type]  # transformers' wrapper hides the device overload
    network.train(False).requires_grad_(False)
    return network


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `model`, with its chat template. Raises as `resolve`, and TargetError if there is none."""
    return _read_tokenizer(resolve(model, need="tokenizer"))


def _read_model(source: Source, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    import torch

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if (source.config.get("quantization_config") or {}).get("quant_method") == "fp8":
        from transformers import FineGrainedFP8Config

        logger.warning("%s: FP8 weights are expanded to %s, twice their size in memory", source.name, dtype)
        options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    if "auto_map" in source.config and not trust_remote_code and not _known(source.config):
        raise ConfigError(
            f"target {source.name}: its model is Python code that comes with the checkpoint, which is not run unasked; "
            f"read it, and give --trust-remote-code, or --set target.trust_remote_code=true where it is hosted"
        )
    try:
        with no_bars():
            network: PreTrainedModel = _factory(source.config).from_pretrained(
                str(source.path), dtype=dtype, use_safetensors=True, local_files_only=True, **options
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's own code raises what it likes
        raise TargetError(
            f"target {source.name}: cannot load {source.path}: {first_line(error)}; fetch its files again, or take "
            f"another target or backend (--backend sglang)"
        ) from error
    return network


def _known(config: dict[str, Any]) -> bool:
    """Whether transformers has the model itself."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return config["model_type"] in CONFIG_MAPPING


def _factory(config: dict[str, Any]) -> Any:
    """The class that makes the model: a causal LM, or what holds one beside an encoder of images."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as known

    kind = config["model_type"]
    wrapped = kind in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    # Of some models transformers would load the language model alone, and leave out what reads images.
    images = bool(config.get("vision_config")) or kind not in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForImageTextToText if wrapped and images else AutoModelForCausalLM


def _dummy_model(config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    import torch

    factory = _factory(config)
    with torch.device(device), torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        network: PreTrainedModel = factory.from_config(_as_config(config), dtype=dtype)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim > 1:  # norms and biases keep their constants
                seed = zlib.crc32(name.encode(), DUMMY_SEED)
                weight.normal_(0, 0.02, generator=torch.Generator(device).manual_seed(seed))
    return network


def _as_config(config: dict[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        settings = {key: value for key, value in config.items() if key != "model_type"}
        result: PretrainedConfig = AutoConfig.for_model(config["model_type"], **settings)
    except (ValueError, KeyError) as error:
        raise TargetError(
            f"model type {config.get('model_type')!r}: {first_line(error)}; update transformers"
        ) from error
    return result


def _has_tokenizer(source: Source) -> bool:
    return source.path is not None and any((source.path / name).is_file() for name in TOKENIZERS)


def _read_tokenizer(source: Source, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        if not _has_tokenizer(source):  # transformers would make up an empty one from config.json
            raise OSError("there is none")
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise TargetError(
            f"target {source.name}: no usable tokenizer in {source.path} ({first_line(error)}); "
            f"copy its tokenizer.json and tokenizer_config.json there"
        ) from error
    if not tokenizer.chat_template and (kept := source.file("chat_template.json")):
        # Older checkpoints of several modalities: transformers gives it to their processor alone.
        try:
            tokenizer.chat_template = json.loads(kept)["chat_template"]
        except (ValueError, KeyError, TypeError):
            raise TargetError(
                f"target {source.name}: its chat_template.json holds no `chat_template`; fetch the checkpoint again"
            ) from None
    return tokenizer
