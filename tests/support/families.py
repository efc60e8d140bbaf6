"""The shapes of published chat templates, each with the special tokens as its family declares them.

The templates in `families/` are our own words: the tokens and the structure are the family's.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import msgspec

TEMPLATES = Path(__file__).parent / "families"

IM = ("<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")
CALLS = ("<tool_call>", "</tool_call>")


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """A family's template (families/NAME.jinja) and tokens.

    opening: the text of its generation prompt. headers: what may stand before an answer of the history, where that is
    not the opening. ends: tokens that end what the target writes, by its model card. bos, eos, pad: named tokens.
    extra: declared as extra special tokens. special: added special tokens that the tokenizer's config does not name.
    plain: added tokens that are not special. configured: the list in generation_config.json; empty: there is no file.
    thought: the key under which a turn holds its thoughts. pieces: a core as SentencePiece's, which writes ▁ before
    words, else byte-level BPE. refuses: names of the conversations (talks.py) that the template refuses.
    """

    name: str
    opening: str
    ends: tuple[str, ...]
    eos: str
    bos: str | None = None
    pad: str | None = None
    extra: tuple[str, ...] = ()
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    configured: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    thought: str = "reasoning_content"
    pieces: bool = False
    refuses: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return self.name


ALTERNATE = frozenset({"assistant first", "two answers"})
NO_TOOLS = frozenset({"call", "several calls", "call and words", "thoughts and calls"})

CHATML = "<|im_start|>assistant\n"
LLAMA3 = "<|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>")
MISTRAL_TOKENS = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
                  "[TOOL_CALLS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")  # fmt: skip
MISTRAL_ENDS = ("[/INST]", "[/TOOL_RESULTS]", "[/SYSTEM_PROMPT]", "</s>", "<s>")
DEEPSEEK_HEADERS = ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>")
DEEPSEEK_TOKENS = ("<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>",
                   "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁output▁begin｜>",
                   "<｜tool▁output▁end｜>", "<｜tool▁outputs▁end｜>", *THINK)  # fmt: skip
COHERE_TOKENS = ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>",
                 "<|CHATBOT_TOKEN|>")  # fmt: skip
COHERE_A_TOKENS = ("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_THINKING|>", "<|END_THINKING|>",
                   "<|START_ACTION|>", "<|END_ACTION|>", "<|START_TOOL_RESULT|>", "<|END_TOOL_RESULT|>")  # fmt: skip
GRANITE_TOKENS = ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>")

FAMILIES = (
    Family(name="smollm2", opening=CHATML, ends=("<|im_end|>",), eos="<|im_end|>", pad="<|im_end|>", extra=IM),
    Family(name="qwen2_5", opening=CHATML, ends=("<|im_end|>", "<|endoftext|>"), eos="<|im_end|>",
           pad="<|endoftext|>", extra=IM, plain=CALLS, configured=("<|im_end|>", "<|endoftext|>")),
    Family(name="qwen3", opening=CHATML, ends=("<|im_end|>", "<|endoftext|>"), eos="<|im_end|>", pad="<|endoftext|>",
           extra=IM, plain=(*THINK, *CALLS), configured=("<|im_end|>", "<|endoftext|>")),
    Family(name="qwen3_thinking", opening=CHATML + "<think>\n", headers=(CHATML,), ends=("<|im_end|>", "<|endoftext|>"),
           eos="<|im_end|>", pad="<|endoftext|>", extra=IM, plain=(*THINK, *CALLS)),
    Family(name="qwen3_5", opening=CHATML + "<think>\n", headers=(CHATML,), ends=("<|im_end|>", "<|endoftext|>"), eos="<|im_end|>",
           pad="<|endoftext|>", extra=IM, plain=(*THINK, *CALLS)),
    Family(name="falcon_h1", opening=CHATML, ends=("<|im_end|>", "<|end_of_text|>"), bos="<|begin_of_text|>",
           eos="<|end_of_text|>", pad="<|pad|>", special=(*IM, *CALLS), configured=("<|end_of_text|>", "<|im_end|>")),
    Family(name="internlm2", opening=CHATML, ends=("<|im_end|>", "</s>"), bos="<s>", eos="</s>", pad="</s>",
           extra=IM, pieces=True),
    Family(name="nemotron3", opening=CHATML + "<think>\n", headers=(CHATML,), ends=("<|im_end|>",), eos="<|im_end|>", special=IM,
           plain=(*THINK, *CALLS)),
    Family(name="hermes3", opening=CHATML, ends=("<|im_end|>",), bos="<|begin_of_text|>", eos="<|im_end|>", extra=IM,
           plain=CALLS),
    Family(name="smollm3", opening=CHATML, ends=("<|im_end|>",), eos="<|im_end|>", special=IM,
           plain=(*THINK, *CALLS)),
    Family(name="lfm2", opening=CHATML, ends=("<|im_end|>",), bos="<|startoftext|>", eos="<|im_end|>", special=IM,
           plain=("<|tool_list_start|>", "<|tool_list_end|>", "<|tool_response_start|>", "<|tool_response_end|>")),
    Family(name="lfm2_5", opening=CHATML, ends=("<|im_end|>",), bos="<|startoftext|>", eos="<|im_end|>", special=IM,
           plain=("<|tool_call_start|>", "<|tool_call_end|>", *THINK)),
    Family(name="llama2", opening="", headers=(" [/INST]",), ends=("</s>",), bos="<s>", eos="</s>", pieces=True,
           refuses=ALTERNATE | NO_TOOLS),
    Family(name="llama3_1", opening=LLAMA3, ends=("<|eot_id|>", "<|eom_id|>"), bos="<|begin_of_text|>",
           eos="<|eot_id|>", special=LLAMA3_TOKENS, configured=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
           refuses=frozenset({"several calls"})),
    Family(name="llama3_1_tags", opening=LLAMA3, ends=("<|eot_id|>", "<|eom_id|>"), bos="<|begin_of_text|>",
           eos="<|eot_id|>", special=LLAMA3_TOKENS, configured=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")),
    Family(name="llama3_2", opening=LLAMA3, ends=("<|eot_id|>",), bos="<|begin_of_text|>", eos="<|eot_id|>",
           special=LLAMA3_TOKENS, refuses=frozenset({"several calls"})),
    Family(name="llama4", opening="<|header_start|>assistant<|header_end|>\n\n", ends=("<|eot|>",),
           bos="<|begin_of_text|>", eos="<|eot|>", special=("<|header_start|>", "<|header_end|>", "<|eom|>")),
    Family(name="mistral_v1", opening="", headers=(" [/INST]",), ends=("</s>",), bos="<s>", eos="</s>", pieces=True,
           refuses=ALTERNATE | NO_TOOLS | {"system"}),
    Family(name="mistral_v3", opening="", headers=MISTRAL_ENDS, ends=("</s>",), bos="<s>", eos="</s>", special=MISTRAL_TOKENS, pieces=True),
    Family(name="mistral_tekken", opening="", headers=MISTRAL_ENDS, ends=("</s>",), bos="<s>", eos="</s>", special=MISTRAL_TOKENS),
    Family(name="mistral_small3", opening="", headers=MISTRAL_ENDS, ends=("</s>",), bos="<s>", eos="</s>", special=MISTRAL_TOKENS,
           refuses=NO_TOOLS),
    Family(name="magistral", opening="", headers=MISTRAL_ENDS, ends=("</s>",), bos="<s>", eos="</s>",
           special=(*MISTRAL_TOKENS, "[THINK]", "[/THINK]", "[TOOL_CONTENT]", "[CALL_ID]", "[ARGS]")),
    Family(name="gemma2", opening="<start_of_turn>model\n", ends=("<end_of_turn>", "<eos>"), bos="<bos>", eos="<eos>",
           pad="<pad>", extra=("<start_of_turn>", "<end_of_turn>"), refuses=ALTERNATE | NO_TOOLS | {"system"}),
    Family(name="gemma3", opening="<start_of_turn>model\n", ends=("<end_of_turn>", "<eos>"), bos="<bos>", eos="<eos>",
           pad="<pad>", special=("<start_of_turn>", "<end_of_turn>"), configured=("<eos>", "<end_of_turn>"),
           refuses=ALTERNATE | NO_TOOLS),
    Family(name="gemma4", opening="<|turn>model\n", headers=("<|turn>model\n", "<tool_response|>"), ends=("<turn|>", "<|tool_response>", "<eos>"), bos="<bos>",
           eos="<eos>", pad="<pad>", thought="reasoning_content",
           special=("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>",
                    "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
           configured=("<eos>", "<turn|>", "<|tool_response>")),
    Family(name="phi3_5", opening="<|assistant|>\n", ends=("<|end|>", "<|endoftext|>"), bos="<s>",
           eos="<|endoftext|>", pad="<|endoftext|>", special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    Family(name="phi4", opening="<|im_start|>assistant<|im_sep|>", ends=("<|im_end|>", "<|endoftext|>"),
           bos="<|endoftext|>", eos="<|im_end|>", special=(*IM, "<|im_sep|>")),
    Family(name="gpt_oss", opening="<|start|>assistant", ends=("<|return|>", "<|end|>", "<|call|>"),
           bos="<|startoftext|>", eos="<|return|>", pad="<|endoftext|>", thought="thinking",
           special=("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"),
           configured=("<|return|>", "<|endoftext|>", "<|call|>")),
    Family(name="glm4_5", opening="<|assistant|>", ends=("<|user|>", "<|observation|>", "<|endoftext|>"),
           eos="<|endoftext|>", pad="<|endoftext|>",
           extra=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
           plain=(*THINK, *CALLS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink"),
           configured=("<|endoftext|>", "<|user|>", "<|observation|>")),
    Family(name="deepseek_v3", opening="<｜Assistant｜>", headers=DEEPSEEK_HEADERS, ends=("<｜end▁of▁sentence｜>",),
           bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>", plain=DEEPSEEK_TOKENS),
    Family(name="deepseek_r1", opening="<｜Assistant｜><think>\n", headers=DEEPSEEK_HEADERS, ends=("<｜end▁of▁sentence｜>",),
           bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>", plain=DEEPSEEK_TOKENS),
    Family(name="command_r", opening="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", ends=("<|END_OF_TURN_TOKEN|>",),
           bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>", pad="<PAD>", special=COHERE_TOKENS),
    Family(name="command_a", opening="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", ends=("<|END_OF_TURN_TOKEN|>",),
           bos="<BOS_TOKEN>", eos="<EOS_TOKEN>", pad="<PAD>", special=COHERE_TOKENS + COHERE_A_TOKENS,
           configured=("<|END_OF_TURN_TOKEN|>",)),
    Family(name="jamba", opening="<|bom|><|assistant|>", ends=("<|eom|>", "<|endoftext|>"), bos="<|startoftext|>",
           eos="<|endoftext|>", pad="<|pad|>", configured=("<|endoftext|>", "<|eom|>"),
           special=("<|bom|>", "<|eom|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"),
           plain=("<tool_calls>", "</tool_calls>")),
    Family(name="granite3", opening="<|start_of_role|>assistant<|end_of_role|>", ends=("<|end_of_text|>",),
           bos="<|end_of_text|>", eos="<|end_of_text|>", pad="<|end_of_text|>", special=GRANITE_TOKENS),
    Family(name="granite4", opening="<|start_of_role|>assistant<|end_of_role|>", ends=("<|end_of_text|>",),
           bos="<|end_of_text|>", eos="<|end_of_text|>", pad="<|pad|>", special=GRANITE_TOKENS, plain=CALLS),
    Family(name="olmo2", opening="<|assistant|>\n", ends=("<|endoftext|>",), bos="<|endoftext|>",
           eos="<|endoftext|>", pad="<|pad|>"),
    Family(name="vicuna", opening=" ASSISTANT:", ends=("</s>",), bos="<s>", eos="</s>", pad="<unk>", pieces=True),
    Family(name="zephyr", opening="<|assistant|>\n", ends=("</s>",), bos="<s>", eos="</s>", pieces=True),
    Family(name="alpaca", opening="### Response:\n", ends=("</s>",), bos="<s>", eos="</s>", pieces=True),
    Family(name="exaone4", opening="[|assistant|]\n<think>\n\n</think>\n\n", headers=("[|assistant|]\n",), ends=("[|endofturn|]",), bos="[BOS]",
           eos="[|endofturn|]", pad="[PAD]", special=("[|system|]", "[|user|]", "[|assistant|]", "[|tool|]"),
           plain=(*THINK, *CALLS)),
    Family(name="minimax_m2", opening="]~b]ai\n<think>\n", headers=("]~b]ai\n",), ends=("[e~[",), bos="]~!b[", eos="[e~[",
           special=("]~b]",), plain=(*THINK, "<minimax:tool_call>", "</minimax:tool_call>")),
    Family(name="kimi_k2", opening="<|im_assistant|>assistant<|im_middle|>", ends=("<|im_end|>", "[EOS]"),
           bos="[BOS]", eos="[EOS]", pad="[PAD]",
           special=("<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>",
                    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
                    "<|tool_call_argument_begin|>", "<|tool_call_end|>"), configured=("<|im_end|>",)),
    Family(name="seed_oss", opening="<seed:bos>assistant\n", headers=("<seed:bos>assistant",), ends=("<seed:eos>",), bos="<seed:bos>",
           eos="<seed:eos>", pad="<seed:pad>",
           plain=("<seed:think>", "</seed:think>", "<seed:tool_call>", "</seed:tool_call>")),
    Family(name="ernie4_5", opening="Assistant: ", ends=("</s>", "<|end_of_sentence|>"), bos="<s>", eos="</s>",
           special=("<|end_of_sentence|>",)),
    Family(name="dots1", opening="<|response|>", ends=("<|endofresponse|>", "<|endoftext|>"), eos="<|endoftext|>",
           pad="<|endoftext|>",
           special=("<|system|>", "<|endofsystem|>", "<|userprompt|>", "<|endofuserprompt|>", "<|response|>",
                    "<|endofresponse|>"), configured=("<|endoftext|>", "<|endofresponse|>")),
)  # fmt: skip

CORPUS = (
    "Name a colour. Blue is one. And a fruit? Plum, for example. Is it Red or Blue? Say yes or no. Rain in Ulm? No rain.",
    "system user assistant tool model think functions commentary final analysis json weather town Ulm Bonn dry wet",
)


@functools.cache
def core(pieces: bool) -> str:
    """A `tokenizers` core of a few hundred tokens, as JSON; the words of CORPUS are tokens with the space before."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    alphabet = [*pre_tokenizers.ByteLevel.alphabet()]
    found = Tokenizer(models.BPE(byte_fallback=pieces, unk_token="<unk>" if pieces else None))
    if pieces:
        found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        found.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        found.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = ["▁", *(chr(code) for code in range(33, 127))]
    else:
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        found.decoder = decoders.ByteLevel()
    known = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))] if pieces else []
    trainer = trainers.BpeTrainer(
        vocab_size=len(known) + 500, special_tokens=known, initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator([text.replace(" ", " ▁") if False else text for text in CORPUS] * 3, trainer)
    state: dict[str, Any] = json.loads(found.to_str())
    if pieces:  # in the vocabulary, and no added tokens, as SentencePiece has them
        state["added_tokens"] = []
    return json.dumps(state)


def write_family(family: Family, directory: Path) -> Path:
    """The files that a target of `family` ships beside its weights, in `directory`."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    found = Tokenizer.from_str(core(family.pieces))
    named = {"bos": family.bos, "eos": family.eos, "pad": family.pad}
    known = [token for token in (*family.special, *named.values(), *family.extra, *family.configured) if token]
    found.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in dict.fromkeys(known)])
    found.add_tokens([AddedToken(t, special=False, normalized=False) for t in family.plain])
    options: dict[str, Any] = {f"{name}_token": token for name, token in named.items() if token}
    if family.extra:
        options["extra_special_tokens"] = list(family.extra)
    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=found, clean_up_tokenization_spaces=False, **options
    )
    second = TEMPLATES / f"{family.name}.tool_use.jinja"
    template = (TEMPLATES / f"{family.name}.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = (
        {"default": template, "tool_use": second.read_text(encoding="utf-8")} if second.is_file() else template
    )
    tokenizer.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(tokenizer)}))
    if family.configured:
        ids = tokenizer.convert_tokens_to_ids(list(family.configured))
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return directory
