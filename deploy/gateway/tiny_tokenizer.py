"""A tokenizer made on the spot, for demonstrations and benchmarks: byte-level BPE trained on made-up sentences."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Final

_TEXT: Final = (
    "the cache of a pod holds blocks and each block has tokens which the engine computes once and finds "
    "again when a prompt begins with the same text so that requests with one prefix go where it is held "
    "and wait less for the first token while others are spread over pods that have room and time for them "
)
_WORDS: Final = tuple(_TEXT.split())
_SPECIAL: Final = ("<|bos|>", "<|im_start|>", "<|im_end|>")
_VOCABULARY: Final = 1_024
_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sentence(rng: random.Random, words: int = 12) -> str:
    """Return a made-up sentence."""
    return " ".join(rng.choice(_WORDS) for _ in range(words)).capitalize() + "."


def text(rng: random.Random, characters: int) -> str:
    """Return made-up text of about this length."""
    parts: list[str] = []
    length = 0
    while length < characters:
        parts.append(sentence(rng))
        length += len(parts[-1]) + 1
    return " ".join(parts)


def write_tokenizer(folder: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and a chat template into a folder, which is made."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415 - an extra

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in _SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(1)  # noqa: S311 - text, not secrets
    tokenizer.train_from_iterator((text(rng, 2_000) for _ in range(20)), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": _SPECIAL[0],
        "eos_token": _SPECIAL[2],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 131_072,
        "chat_template": _TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
