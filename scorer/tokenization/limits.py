"""Limits of tokenization: bounds on prompts, chats, templates and loaded tokenizers, the same in every deployment."""

from __future__ import annotations

from typing import NamedTuple

_MIB = 1024 * 1024


class TokenizerLimits(NamedTuple):
    """Bounds that no deployment has a reason to move.

    Attributes:
        prompt_bytes: longest prompt, UTF-8 bytes, above what any engine's context takes; also of a rendered chat.
        messages: most messages of one chat; templates are rendered over all of them.
        models: tokenizers kept loaded; the least used goes first.
        model_bytes: ``tokenizer.json`` bytes of them; loaded they take some ten times as much.
        template_bytes: longest chat template of a request; those of models have some ten thousand.
        template_seconds: longest rendering of a chat template; of a request's own, in processor time, after which its
            process is killed.
        template_processes: processes that render templates of requests; more requests wait.
        template_memory_bytes: memory of such a process; one that needs more is killed.
        template_wait_seconds: longest wait for a request's own template, for a free process and the text.
        remote_seconds: longest wait for another tokenizer service.
    """

    prompt_bytes: int = 16 * _MIB
    messages: int = 10_000
    models: int = 32
    model_bytes: int = 512 * _MIB
    template_bytes: int = 256 * 1024
    template_seconds: float = 2.0
    template_processes: int = 1
    template_memory_bytes: int = 256 * _MIB
    template_wait_seconds: float = 10.0
    remote_seconds: float = 5.0


TOKENIZER_LIMITS = TokenizerLimits()
