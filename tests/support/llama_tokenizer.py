"""A tokenizer like Llama 2's: it puts a space before every text, which it writes as a part of the word behind."""

import json
from pathlib import Path
from typing import Any

from sea_jax.models import tokenizer
from sea_jax.models.tokenizer import Tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<s>[ {{ message['content'] }} ]"
    "{% else %} {{ message['content'] }} </s>{% endif %}{% endfor %}"
)


def load(directory: Path, **settings: Any) -> Tokenizer:
    """Writes the files into a directory and reads them.

    Args:
      directory: there already.
      settings: of tokenizer_config.json, beside those that name the special tokens.
    """
    special = ["<unk>", "<s>", "</s>"]
    letters = sorted({*"▁\n[]:.", *map(chr, range(97, 123)), *map(chr, range(65, 91))})
    merges = [("▁", "A"), ("b", "c"), ("▁", "bc")]
    pieces = [*special, *letters, *("".join(merge) for merge in merges)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    rules = {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": piece, **flags} for number, piece in enumerate(special)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "merges": merges,
        },
    }
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer.json").write_text(json.dumps(rules))
    (directory / "tokenizer_config.json").write_text(json.dumps({**named, "chat_template": CHAT_TEMPLATE, **settings}))
    return tokenizer.load(directory)
