"""What holds for the oracles: the peers' packages are at hand."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peers import FOLDER, importable, peer

# Read by torch and vLLM when they are first imported. Peers compile what runs here a few times, on a CPU.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["VLLM_TARGET_DEVICE"] = "cpu"


def pytest_sessionstart() -> None:
    """Fail where the peers are missing: an oracle that is skipped tells nothing."""
    if not (FOLDER / "peers.txt").is_file():
        pytest.exit(f"no peers in {FOLDER}: run `make test-oracles`, or set SPECD_PEERS to their folder", returncode=1)
    listed = Path(__file__).with_name("peers.txt")
    if (FOLDER / "peers.txt").read_bytes() != listed.read_bytes():
        pytest.exit(f"{FOLDER} has other versions than {listed}: run `make test-oracles` again", returncode=1)
    assert "torch" not in sys.modules, "it reads TORCHDYNAMO_DISABLE when it is imported"


@pytest.fixture(scope="module")
def sglang() -> Iterator[None]:
    """SGLang's modules, in one process without a server, and without its processors of images."""
    from peer_engines import Off, OneRank

    quiet: Any = types.ModuleType("sglang.srt.configs.utils")
    quiet.register_image_processor = quiet.register_processor = lambda *_: None
    sys.modules[quiet.__name__] = quiet
    for name in ("dflash", "dspark", "llama_eagle3"):
        peer(f"sglang.srt.models.{name}")
    spec = types.SimpleNamespace(speculative_draft_window_size=None)
    answers = {"get_parallel": OneRank, "get_exec": Off, "get_spec": lambda: spec}
    with pytest.MonkeyPatch.context() as patch, importable():
        for module in [module for name, module in sys.modules.items() if name.startswith("sglang.")]:
            for name, answer in answers.items():
                if name in vars(module):
                    patch.setattr(module, name, answer)
        yield


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's modules, and a group of this process alone."""
    with importable(), pytest.MonkeyPatch.context() as patch:
        models = peer("vllm.model_executor.models.registry")

        def look(model: Any) -> Any:
            """What a model's class can do. vLLM would ask another process, which has no peers."""
            return models._ModelInfo.from_model_cls(model.load_model_cls())

        patch.setattr(models._LazyRegisteredModel, "inspect_model_cls", look)
        state, config = peer("vllm.distributed.parallel_state"), peer("vllm.config")
        meeting = tmp_path_factory.mktemp("vllm") / "meeting"
        state.init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        with config.set_current_vllm_config(config.VllmConfig()):
            state.initialize_model_parallel(1, 1)
        yield
        state.destroy_model_parallel()
        state.destroy_distributed_environment()
