"""Which renderer the engine uses for a model's chats: the Jinja template, Harmony, or one that is its own.

Told from ``config.json`` and the folder's files, as vLLM tells it. What only the engine can render is refused with the
model's type and the reason; its text and token ids are scored all the same.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from kvatlas.scorer.tokenization.arguments import EngineArguments
from kvatlas.scorer.tokenization.files import ModelFiles

_OWN_ENCODERS: Final = {
    "DeepseekV32ForCausalLM": "vLLM's own encoder for DeepSeek V3.2",
    "DeepseekV4ForCausalLM": "vLLM's own encoder for DeepSeek V4",
    "DeepseekV4ForConditionalGeneration": "vLLM's own encoder for DeepSeek V4",
    "DeepseekV41ForCausalLM": "vLLM's own encoder for DeepSeek V4",
    "KimiK3ForConditionalGeneration": "the Python code of the model's tokenizer",
    "InklingForCausalLM": "vLLM's own encoder for Inkling",
    "InklingForConditionalGeneration": "vLLM's own encoder for Inkling",
    "MoonshotKimiaForCausalLM": "the model's own tokenizer",
    "Alpamayo2Super": "the model's own tokenizer",
}
_MODES: Final = {"mistral": "mistral-common", "cohere": "Cohere's library"}


class Renderer(NamedTuple):
    """How a model's chats are rendered; ``refused`` says why they cannot be here, empty where they can."""

    kind: Literal["template", "harmony", "other"]
    refused: str = ""


def renderer_of(files: ModelFiles, arguments: EngineArguments) -> Renderer:
    """Return the renderer of a model."""
    model_type = str(files.model_config.get("model_type") or "")
    if model_type == "gpt_oss":
        return Renderer("harmony")
    mode = arguments.tokenizer_mode.replace("auto", "")
    by = _MODES.get(mode, "")
    if not by and mode != "hf" and files.mistral_format:
        by = "mistral-common"
    for architecture in files.model_config.get("architectures") or ():
        by = by or _OWN_ENCODERS.get(str(architecture), "")
    if "terratorch" in model_type:
        by = by or "nothing: such models have no chat"
    if not by:
        return Renderer("template")
    named = f"of type {model_type}" if model_type else "of this model"
    return Renderer("other", f"chats {named} are rendered by {by}, which is not known here; send token ids instead")
