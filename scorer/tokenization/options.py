"""Settings of tokenization (section ``tokenizer``)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from kvatlas.bridge.runtime.settings import Section


class TokenizerSettings(Section, frozen=True, kw_only=True):
    """Where tokenizers come from, and what requests may ask of them."""

    CONSTANTS: ClassVar[frozenset[str]] = frozenset((
        "content_format", "hub_cache", "max_messages", "max_model_bytes", "max_models", "max_prompt_bytes",
        "max_template_bytes", "order", "remote_timeout_ms", "request_template_bytes",
        "request_template_processes", "request_template_wait_seconds", "template_seconds", "threads",
    ))  # fmt: skip

    models: Annotated[
        tuple[str, ...], Meta(description="MODEL=DIR: folder with the model's tokenizer.json; wins over the root")
    ] = ()
    root: Annotated[str, Meta(description="folder that holds one folder per model, by model name")] = ""
    engine_args: Annotated[
        tuple[str, ...],
        Meta(
            description="MODEL=ARGUMENTS: the command line of the model's engine; --chat-template, "
            "--default-chat-template-kwargs, --chat-template-content-format, --reasoning-effort-map and the flags of "
            "tools and tokenizer mode are taken from it"
        ),
    ] = ()
    transformers: Annotated[
        Literal["4", "5"],
        Meta(
            description="major version of transformers in the engines: 4 applies add_bos_token and add_eos_token for "
            "the classes that do so"
        ),
    ] = "5"
    harmony_date: Annotated[
        str,
        Meta(
            description="date in the system text of gpt-oss chats, YYYY-MM-DD, as the engine's VLLM_SYSTEM_START_DATE; "
            "empty: today"
        ),
    ] = ""
    hub: Annotated[bool, Meta(description="fetch tokenizers of unknown models from the Hugging Face hub")] = False
    hub_models: Annotated[
        tuple[str, ...], Meta(description="models that may be fetched from the hub, shell patterns; all when empty")
    ] = ()
    hub_revision: Annotated[str, Meta(description="branch, tag or commit to fetch from the hub")] = "main"
    remote: Annotated[
        str, Meta(description="another tokenizer service: host:port, or unix:PATH of its socket; off when empty")
    ] = ""
    prefix_cache_bytes: Annotated[
        int, Meta(description="memory for text already tokenized, all models together; 0 turns it off", ge=0)
    ] = 128 * 2**20
    request_templates: Annotated[bool, Meta(description="accept chat templates that requests bring")] = False
