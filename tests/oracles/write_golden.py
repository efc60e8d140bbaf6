"""Writes tests/golden/drafts.json anew from what peers say, with PYTHONPATH=.:tests/support."""

from __future__ import annotations

import json
import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # read by torch when it is first imported

from golden_drafts import (
    DFLASH_CASES,
    DSPARK_CASES,
    EAGLE_CASES,
    FILE,
    figures,
    golden_dflash,
    golden_dspark,
    golden_eagle,
)
from peer_dflash import of_specforge as dflash_of_specforge
from peer_dspark import of_specforge as dspark_of_specforge
from peer_eagle import of_specforge, of_speculators

if __name__ == "__main__":
    found = {}
    for name, config in EAGLE_CASES.items():
        ask = of_specforge if name.startswith("specforge") else of_speculators
        result = ask(*golden_eagle(config))
        found[f"eagle3: {name}"] = figures(result.total, result.counted, result.gradients)
    for name, settings in DFLASH_CASES.items():
        dflash = dflash_of_specforge(*golden_dflash(settings))
        found[f"dflash: {name}"] = figures(dflash.total, [dflash.counted], dflash.gradients)
    for name, own in DSPARK_CASES.items():
        dspark, _ = dspark_of_specforge(*golden_dspark(own))
        found[f"dspark: {name}"] = figures(dspark.total, [dspark.counted], dspark.gradients)
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
