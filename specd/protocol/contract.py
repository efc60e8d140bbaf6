"""What a daemon publishes about its target and its ring."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from specd.protocol.limits import (
    MAX_DIMENSIONS,
    MAX_NAME_CHARS,
    MAX_PAYLOAD_BYTES,
    MAX_TAPS,
    U64,
    Int31,
    Name,
    Names,
    Positive,
    PositiveFloat,
    Reason,
)

TEMPLATES = "additional_chat_templates"
"""The one folder whose files may be artifacts: further chat templates of a tokenizer, as transformers saves them."""


def is_file_name(name: str) -> bool:
    """Whether an artifact may be written into a directory under its name: a plain one, or a template's in TEMPLATES."""
    folder, slash, file = name.rpartition("/")
    return (
        not file.startswith(".")
        and "\0" not in name
        and (folder == TEMPLATES and file.endswith(".jinja") if slash else bool(file))
    )


class ArtifactRef(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A piece of the target a trainer can FETCH: a file's bytes, or a row-major tensor.

    nbytes: its size. shape, dtype: of a tensor; empty for a file. same_as: the artifact that holds the same bytes.
    """

    nbytes: U64
    shape: Annotated[tuple[U64, ...], Meta(max_length=MAX_DIMENSIONS)] = ()
    dtype: Annotated[str, Meta(max_length=MAX_NAME_CHARS)] = ""
    same_as: Annotated[str, Meta(max_length=MAX_NAME_CHARS)] = ""


FINGERPRINT = (
    "model_type", "hidden_size", "num_layers", "vocab_size", "dtype", "weights", "tokenizer", "chat_template",
)  # fmt: skip
"""The parts of a fingerprint, in order."""


class TargetContract(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Identity and shape of a target. Targets with equal `fingerprint` deliver the same states.

    weights: digest of the weights. tokenizer, chat_template: digests of those files, empty if there is none.
    taps: the tap convention. tap_layers: the layers a draft's taps may be spread over, empty for all, as of every
    backend of specd's own: a residual stream runs through linear attention, too. dtype: of the weights as they run.
    artifacts: what FETCH serves, by name (`config.json`, tokenizer files, `embedding` [V, H], `lm_head` [V, H]).
    revision: the commit of a model hub whose snapshot it was loaded from; empty where it came from elsewhere.
    embedding_scale: what its embedding multiplies a row of `embedding` by. logit_scale, logit_softcap: its logits are
    products of the final state with `lm_head` times the one, and c · tanh(… / c) of that where the other is c, not 0.
    odd_embedding, odd_logits: why that does not describe them; empty if it does. payloads: names of the arrays that a
    sequence may bring, as those of images; none if it takes text alone.
    """

    model: str
    model_type: str
    hidden_size: Positive
    num_layers: Positive
    vocab_size: Positive
    dtype: str
    weights: str
    tokenizer: str = ""
    chat_template: str = ""
    taps: str = "residual-after-layer, 0-based"
    tap_layers: Annotated[tuple[Int31, ...], Meta(max_length=MAX_TAPS)] = ()
    revision: Annotated[str, Meta(max_length=MAX_NAME_CHARS)] = ""
    artifacts: Annotated[dict[Name, ArtifactRef], Meta(max_length=1024)] = {}
    embedding_scale: PositiveFloat = 1.0
    logit_scale: PositiveFloat = 1.0
    logit_softcap: Annotated[float, Meta(ge=0)] = 0.0
    odd_embedding: Reason = ""
    odd_logits: Reason = ""
    payloads: Names = ()

    @property
    def fingerprint(self) -> str:
        """Identity of the target as far as states go; what else the contract has follows from it."""
        return ":".join(str(getattr(self, name)) for name in FINGERPRINT)


class ReplayInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The states that a daemon keeps over epochs, as of now.

    cells: for one batch each, however small it is; none of a disk that is not used any more. used: those that hold one.
    cell_bytes: most bytes of states in one. failed: why its disk is not used any more, empty while it is. encoding: how
    they are kept, `raw` to the bit.
    """

    cells: U64
    used: U64
    cell_bytes: U64
    failed: Reason = ""
    encoding: Name = "raw"


class RingInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ring's geometry. slot_tokens: longest batch of the daemon's own capture, in tokens.

    payload_bytes: most bytes of the payloads of a batch; 0 if the daemon takes none.
    """

    num_slots: Positive
    slot_bytes: Annotated[int, Meta(ge=1)]
    slot_tokens: Positive
    payload_bytes: Annotated[int, Meta(ge=0, le=MAX_PAYLOAD_BYTES)] = 0
