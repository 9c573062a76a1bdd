"""Trains the small tokenizer of the tests: byte-level BPE on text from the grammar below.

Run ``python tests/data/tokenizer/train.py`` to write ``tokenizer.json`` anew. Every choice is seeded and the trainer
breaks ties by token, so the same library version writes the same file. The shape is that of current chat models: NFC,
a Split regex in front of byte-level, a beginning token that the post-processor adds, ChatML-like special tokens.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE: Final = Path(__file__).parent
VOCABULARY: Final = 4096
BYTES: Final = 256
SPECIAL: Final = ["<|bos|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|tool|>", "<|image|>"]
#: Added, but part of ordinary text, as current models have them.
MARKUP: Final = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SUBJECTS: Final = """the router|the scheduler|a replica|the cache|an engine|the worker|a long prompt|the index|my
 program|our team|the customer|a new reader|this paragraph|the second block|every token|the previous answer|a small
 change|the operator|the harbour|an old bridge|the gardener|a quiet library|the mountain railway|the weather station|
 my neighbour|the translator|a careful engineer|the museum|the orchestra|a student of history""".replace("\n", "")
_VERBS: Final = """keeps|forgets|reads|evicts|stores|measures|describes|compares|repeats|follows|answers|moves|explains|
 counts|restores|replaces|shares|requests|schedules|predicts|remembers|publishes|confirms|repairs|translates|paints|
 crosses|observes|collects|prepares""".replace("\n", "")
_OBJECTS: Final = """the prefix of the conversation|sixteen tokens at a time|a table of numbers|the last message|its own
 memory|a list of blocks|the shortest path|the system prompt|three examples|an unexpected result|the same question|a
 letter from the coast|the timetable of the ferry|two hundred photographs|the recipe for rye bread|a map of the valley|
 the opening chapter|an estimate of the cost|the difference between both versions|yesterday's measurements|a summary in
 plain words|the names of all participants|one page of source code|the temperature of the sea""".replace("\n", "")
_ADVERBS: Final = """quickly|without hesitation|once more|before noon|in the evening|as agreed|with great care|almost
 never|for the first time|on the third attempt|in parallel|at the lowest price|in a moment|from memory""".replace(
    "\n", ""
)
_QUESTIONS: Final = """How does|Why does|When exactly does|Can you tell me whether|Please explain in detail how|Is it
 true that|What happens if|Under which conditions will""".replace("\n", "")
_OTHER: Final = """Der Verteiler fragt, welche Maschine den Anfang des Gesprächs noch im Speicher hält.|Größe, Maß und
 Übung gehören zusammen.|Le serveur répond à la question avant la fin de la journée, c'est déjà ça.|El camino más corto
 no siempre es el más rápido, señor.|Сервер помнит начало разговора и отвечает быстрее.|この会話の最初の部分は
まだ覚えています。|缓存命中可以节省大量计算。|모델은 이전 질문을 기억합니다.|😀 fine, thanks! 🚀🚀|
naïve café — “quoted” … 1½ €""".replace("\n", "")
_CODE: Final = """def total(values: list[int]) -> int:
    result = 0
    for value in values:
        result += value
    return result


class Holder:
    def __init__(self, name, limit=16):
        self.name = name
        self.limit = limit

    def full(self):
        return len(self.items) >= self.limit

{"name": "lookup", "arguments": {"city": "Lisbon", "days": 3, "units": "metric", "strict": false}}
{"type": "function", "function": {"name": "search", "description": "Find a text", "parameters": {"type": "object",
"properties": {"query": {"type": "string"}, "limit": {"type": "integer"}}, "required": ["query"]}}}
SELECT name, count(*) FROM blocks WHERE pod = 'a' AND epoch > 12 GROUP BY name ORDER BY 2 DESC;
if (index < 0 || index >= size) { return NULL; }  // out of range
"""


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split("|")]


def sentence(rng: random.Random) -> str:
    """Return one sentence of the grammar."""
    subject, verb, obj, adverb = (rng.choice(_words(part)) for part in (_SUBJECTS, _VERBS, _OBJECTS, _ADVERBS))
    kind = rng.random()
    if kind < 0.15:
        return f"{rng.choice(_words(_QUESTIONS))} {subject} {verb.rstrip('s')} {obj} {adverb}?"
    if kind < 0.25:
        return (
            f"In {rng.randint(1900, 2030)} it took {rng.randint(2, 98)}.{rng.randint(0, 99)} ms; {subject} {verb} it."
        )
    if kind < 0.32:
        return rng.choice(_words(_OTHER))
    if kind < 0.42:
        other = rng.choice(_words(_SUBJECTS))
        return f"{subject.capitalize()} {verb} {obj}, but {other} doesn't, and that's {adverb} a problem."
    return f"{subject.capitalize()} {verb} {obj} {adverb}."


def document(rng: random.Random, sentences: int) -> str:
    """Return a text of a few paragraphs, lists and code."""
    parts = []
    for number in range(sentences):
        parts.append(sentence(rng))
        mark = rng.random()
        parts.append("\n\n" if mark < 0.1 else "\n" if mark < 0.2 else f"\n- {number}. " if mark < 0.25 else " ")
        if mark > 0.98:
            parts.append("\n```\n" + _CODE + "```\n")
    return "".join(parts)


def main() -> None:
    """Train and write ``tokenizer.json``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(20260101)
    tokenizer.train_from_iterator((document(rng, 60) for _ in range(60)), trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in MARKUP])
    bos = tokenizer.token_to_id("<|bos|>")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|bos|> $A", pair="<|bos|> $A <|bos|>:1 $B:1", special_tokens=[("<|bos|>", bos)]
            ),
        ]
    )
    tokenizer.save(str(HERE / "tokenizer.json"))


if __name__ == "__main__":
    main()
