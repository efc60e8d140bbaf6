"""A small tokenizer with a chat template, as a directory of the files a target ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As SmolLM2's: a default system turn, every content verbatim."""

THINKING = """
{%- set query = namespace(at=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set query.at = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- set said = message.content %}
{%- if message.role == 'assistant' %}
{%- set thought = '' %}
{%- if '</think>' in said %}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set said = said.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > query.at and (loop.last or thought) %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}
{{- said }}
{%- for call in message.tool_calls or [] %}{{ '\n<tool_call>\n' + call.function.name + '\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + said + '\n</tool_response><|im_end|>\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\n' + said + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""
"""As Qwen3's: thoughts of earlier turns are dropped, the last answer gets a think block even if it has no thought."""

MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A template that says itself what the assistant writes."""

TRIMMED = (
    "{% for message in messages %}{{ '[' + message['role'] + '] ' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ ' <|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
"""As Llama 2's: content is trimmed, a space stands before it and before the end-of-turn token."""

CORPUS = [
    "What is the tone of this message? The tone of this message is positive and friendly.",
    "Write a Python function. def add(a, b):\n    return a + b\n",
    "system user assistant tool think tool_call [user] [assistant] Be brief.",
]


def write_tokenizer(directory: Path, template: str = CHATML) -> Path:
    """A byte-level BPE tokenizer of a few hundred tokens, saved to `directory`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    return directory


def data_model(directory: Path, template: str) -> Path:
    """A target's directory as far as its data goes: that tokenizer and a config.json, without weights."""
    write_tokenizer(directory, template)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"vocab_size": 400, "max_position_embeddings": 512}
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **shape}))
    return directory


def write_base(directory: Path, *, padded: int = 0, reserved: int = 0) -> Path:
    """A base model's tokenizer, without a template: its post-processor writes BOS. And its config.json.

    padded: rows that the embedding has beyond the tokenizer's tokens; negative, and it has fewer. reserved: tokens that
    are kept for later, behind all others.
    """
    from tokenizers import Tokenizer, processors

    write_tokenizer(directory)
    core = Tokenizer.from_file(str(directory / "tokenizer.json"))
    core.add_special_tokens(["<|begin|>", *(f"<|reserved_{number}|>" for number in range(reserved))])
    begin = core.token_to_id("<|begin|>")
    core.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", begin)])
    core.save(str(directory / "tokenizer.json"))
    for file in directory.glob("chat_template*"):
        file.unlink()
    known = json.loads((directory / "tokenizer_config.json").read_bytes()) | {"bos_token": "<|begin|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(known))
    size = core.get_vocab_size() + padded
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": size}))
    return directory


def write_target(directory: Path, num_layers: int = 4, template: str = CHATML, *, padded: int = 0) -> Path:
    """A tiny Llama of random weights with that tokenizer, saved to `directory`. padded: see write_base."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    size = len(AutoTokenizer.from_pretrained(write_tokenizer(directory, template))) + padded
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=size, max_position_embeddings=2048, initializer_range=0.25,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)  # type: ignore[no-untyped-call]
    return directory


def talk(*contents: str) -> list[dict[str, Any]]:
    """A conversation in which user and assistant take turns."""
    return [
        {"role": role, "content": content}
        for role, content in zip(("user", "assistant") * len(contents), contents, strict=False)
    ]


def write_rows(file: Path, *rows: dict[str, Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


OWN_CODE = """
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def consist_of_code(directory: Path) -> None:
    """Make the llama in `directory` one whose Python code lies beside its weights."""
    (directory / "own.py").write_text(OWN_CODE)
    config = json.loads((directory / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "own_llama", "auto_map": names}))
