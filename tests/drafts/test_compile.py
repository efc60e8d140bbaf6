"""torch.compile for drafts, where there is no compiler."""

from __future__ import annotations

import pytest

from specd.drafts.compile import compiled
from specd.errors import ConfigError


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about torch
@pytest.mark.usefixtures("few_compile_workers")
def test_a_machine_without_a_compiler_is_told_what_is_missing_and_what_works_without() -> None:
    import torch._inductor.config

    without = {"cpp.cxx": ("/no/such/compiler",), "force_disable_caches": True}
    with (
        torch._inductor.config.patch(without),
        pytest.raises(ConfigError, match=r"/no/such/compiler.*C compiler; walk instead"),
    ):
        compiled(lambda x: 2 * x + 1, "walk instead")(torch.ones(7))
