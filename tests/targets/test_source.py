"""Finding a target and reading its checkpoint: names, conversion, dummy weights, FP8, digests, and every refusal."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from chats import write_tokenizer
from specd.config.settings import TargetConfig
from specd.data.tokenizer import load_tokenizer as data_tokenizer
from specd.errors import ConfigError, DataError, TargetError
from specd.targets import digest
from specd.targets import source as checkpoint
from specd.targets.registry import load_target
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


def test_an_unknown_model_lists_the_presets(tmp_path: Path) -> None:
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


def test_a_directory_whose_name_is_not_utf_8_is_refused_by_it(shape_only: Path) -> None:
    odd = shape_only.rename(os.fsdecode(os.fsencode(shape_only.parent) + b"/caf\xe9"))
    with pytest.raises(ConfigError, match=r"caf\\xe9' is not UTF-8, .*; rename it"):
        checkpoint.resolve(str(odd))


def test_a_home_that_nobody_knows_is_no_directory() -> None:
    with pytest.raises(ConfigError, match="model '~no-such-user/model': expected a preset"):
        checkpoint.resolve("~no-such-user/model")
    with pytest.raises(ConfigError, match="tokenizer '~no-such-user': no tokenizer there"):
        checkpoint.with_tokenizer(checkpoint.resolve("Qwen3-8B", need="shape"), "~no-such-user")


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


def test_a_tokenizer_may_come_from_a_directory_of_its_own(tmp_path: Path) -> None:
    """A preset's shape knows no tokenizer; its files count as they are, or compressed."""
    directory = write_tokenizer(tmp_path / "tokenizer")
    plain = (directory / "tokenizer.json").read_bytes()
    shape = checkpoint.resolve("Qwen3-8B", need="shape")
    assert checkpoint.with_tokenizer(shape, "") == shape
    assert checkpoint.with_tokenizer(shape, str(directory)).file("tokenizer.json") == plain
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer there; expected a directory with tokenizer\.json or"):
        checkpoint.with_tokenizer(shape, str(directory))
    (directory / "tokenizer.json.gz").write_bytes(gzip.compress(plain))
    found = checkpoint.with_tokenizer(shape, str(directory))
    assert found.file("tokenizer.json") == plain
    assert found.file("vocab.json") is None
    (directory / "tokenizer.json.gz").write_bytes(gzip.compress(plain)[:99])
    with pytest.raises(TargetError, match=r"tokenizer\.json\.gz cannot be unpacked"):
        found.file("tokenizer.json")


def test_a_template_that_a_processor_has_is_the_tokenizers_too(tmp_path: Path, shape_only: Path) -> None:
    shutil.copytree(write_tokenizer(tmp_path / "tokenizer"), shape_only, dirs_exist_ok=True)
    own = (shape_only / "chat_template.jinja").read_text()
    (shape_only / "chat_template.json").write_text(json.dumps({"chat_template": "other"}))
    assert load.load_tokenizer(f"{shape_only}/").chat_template == own == data_tokenizer(shape_only).chat_template
    (shape_only / "chat_template.jinja").unlink()
    assert load.load_tokenizer(f"{shape_only}/").chat_template == "other" == data_tokenizer(shape_only).chat_template
    (shape_only / "chat_template.json").write_text("[]")
    with pytest.raises(DataError, match=r"chat_template\.json holds no `chat_template`"):
        data_tokenizer(shape_only)
    with pytest.raises(TargetError, match=r"its chat_template\.json holds no `chat_template`"):
        load.load_tokenizer(f"{shape_only}/")
    (shape_only / "chat_template.json").unlink()
    assert data_tokenizer(shape_only).chat_template is None


def test_a_target_of_made_up_weights_offers_the_tokenizer_it_was_given(tmp_path: Path, shape_only: Path) -> None:
    directory = write_tokenizer(tmp_path / "tokenizer")
    config = TargetConfig(model=f"{shape_only}/", load_format="dummy", tokenizer=str(directory), device="cpu")
    bare, given = load_target(msgspec.structs.replace(config, tokenizer="")), load_target(config)
    assert "tokenizer.json" not in bare.contract.artifacts
    assert bytes(given.artifact("tokenizer.json")) == (directory / "tokenizer.json").read_bytes()
    assert bare.contract.fingerprint != given.contract.fingerprint
    assert given.contract.model == str(shape_only.resolve())


def test_a_download_takes_all_chat_templates(monkeypatch: pytest.MonkeyPatch, shape_only: Path) -> None:
    asked: list[str] = []

    def snapshot(repo: str, *, allow_patterns: list[str]) -> str:
        asked[:] = allow_patterns
        return str(shape_only)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    checkpoint.resolve("someone/some-model", need="tokenizer")
    assert {"chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"} <= {*asked}
    assert not any("safetensors" in pattern for pattern in asked)


def test_a_target_from_the_hub_names_its_commit(monkeypatch: pytest.MonkeyPatch, saved: Path, tmp_path: Path) -> None:
    commit = "5a1e" * 10
    place = tmp_path / "models--someone--some-model" / "snapshots" / commit
    shutil.copytree(saved, place)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(place))
    config = TargetConfig(model="someone/some-model", device="cpu")
    made_up = msgspec.structs.replace(config, load_format="dummy")
    elsewhere = msgspec.structs.replace(config, model=f"{saved}/")
    assert [load_target(one).contract.revision for one in (config, made_up, elsewhere)] == [commit, "", ""]
    assert checkpoint.resolve("Qwen3-8B", need="shape").revision == ""
