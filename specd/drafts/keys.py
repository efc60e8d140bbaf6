"""Keys of a published draft's config.json: those that are read, those that say nothing, and all others, refused.

A key that nobody here knows may change what the draft computes, and a draft that computes something else guesses
nothing right and shows no other sign of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec

from specd.errors import ConfigError

HARMLESS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash",
    "_name_or_path", "add_cross_attention", "architectures", "attention_dropout", "attn_implementation", "auto_map",
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "confidence_head_alpha",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range", "is_decoder",
    "is_encoder_decoder", "label2id", "length_penalty", "mask_token", "max_length", "max_window_layers",
    "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels",
    "num_return_sequences", "num_target_layers", "output_attentions", "output_hidden_states", "output_scores",
    "pad_token_id", "prefix", "pretraining_tp", "problem_type", "pruned_heads", "remove_invalid_values",
    "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id", "speculators_config",
    "speculators_version", "suppress_tokens", "target_model_type", "target_num_hidden_layers",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k",
    "top_p", "torch_dtype", "torchscript", "transformers_version", "typical_p", "use_bfloat16", "use_cache",
})  # fmt: skip
"""Keys whose value changes nothing that a draft computes, and what `transformers` writes beside them."""

ROTARY = frozenset({"rope_parameters", "rope_scaling", "rope_theta"})


def flat(config: Mapping[str, Any], section: str) -> dict[str, Any]:
    """`config` with the keys of its `section` on top of those of the same name; a key that is null is absent."""
    inside = config.get(section) or {}
    if not isinstance(inside, Mapping):
        raise ConfigError(f"config.json: {section} is {inside!r}, expected an object")
    levels = ({key: value for key, value in config.items() if key != section}, inside)
    return {key: value for level in levels for key, value in level.items() if value is not None}


def check_architecture(config: Mapping[str, Any], where: str, known: Collection[str]) -> None:
    """Raise ConfigError unless a config.json names one of the `known` architectures."""
    found = config.get("architectures")
    if not (isinstance(found, list) and any(name in known for name in found)):
        raise ConfigError(
            f"draft {where!r}: architectures is {found!r}, expected one of {', '.join(known)}; it is no draft of this "
            f"method"
        )


def check(config: Mapping[str, Any], where: str, *, read: Collection[str], only: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise ConfigError for keys of a flat config that are not known, and for values that cannot be computed.

    read: keys that the caller reads. only: values that a key may have, where others mean another computation.
    """
    for key, values in only.items():
        if key in config and config[key] not in values:
            expected = " or ".join(map(repr, values)) or "none"
            raise ConfigError(
                f"draft {where!r}: {key} is {config[key]!r}, expected {expected}; specd cannot run this draft"
            )
    if strange := sorted(config.keys() - HARMLESS - ROTARY - set(read) - only.keys()):
        named = ", ".join(f"{key}={config[key]!r}" for key in strange)
        raise ConfigError(
            f"draft {where!r}: its config.json has {named}, which specd does not know: expected only keys whose "
            f"meaning it knows, as others may change what the draft computes; remove them from a copy if they do not"
        )


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn what a block that makes a shape of a config.json raises into a ConfigError that names `where`."""
    try:
        yield
    except KeyError as error:
        raise ConfigError(f"draft {where!r}: its config.json has no key {error}") from None
    except (msgspec.ValidationError, TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"draft {where!r}: config.json: {error}") from None
