"""A kind of block draft: the parts of it that others ask for by name, and DFlash, which is the backbone alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from specd.drafts.backbone.drafter import BlockDrafter
from specd.drafts.backbone.network import Backbone
from specd.drafts.backbone.shape import BlockShape
from specd.drafts.keys import check_architecture


class Form(NamedTuple):
    """One kind of block draft.

    title: for people. architectures: what its config.json may name, its own first. kind: what Speculators calls it.
    shape, network, drafter: its classes. own: fields of `shape` that BlockShape lacks; settings and keys of config.json
    have the same names. final: the target's final states teach it. unbroken: of a block only predictions up to the
    first token that is no label count. only: keys of config.json that may have other values than DFlash's, see
    `export.ONLY`.
    """

    title: str
    architectures: tuple[str, ...]
    kind: str
    shape: type[BlockShape] = BlockShape
    network: type[Backbone] = Backbone
    drafter: type[BlockDrafter] = BlockDrafter
    own: tuple[str, ...] = ()
    final: bool = False
    unbroken: bool = False
    only: Mapping[str, tuple[Any, ...]] = {}


DFLASH = Form("DFlash", ("DFlashDraftModel", "DFlashSpeculator"), "dflash")
"""Its second architecture is Speculators' name."""


def form_of(config: Mapping[str, Any], forms: Collection[Form], where: str) -> Form:
    """The one of `forms` that a draft's config.json names. Raises ConfigError where it is none of them."""
    known = [name for form in forms for name in form.architectures]
    check_architecture(config, where, known)
    return next(form for form in forms if set(config["architectures"]) & set(form.architectures))
