"""Settings of tokenization (section ``tokenizer``)."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from kvatlas.bridge.runtime.settings import Section

BackendName = Literal["local", "hub", "remote"]


class TokenizerSettings(Section, frozen=True, kw_only=True):
    """Where tokenizers come from, and the limits of tokenizing and of chat templates."""

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
    hub_cache: Annotated[str, Meta(description="folder for files from the hub; the hub client's own when empty")] = ""
    hub_revision: Annotated[str, Meta(description="branch, tag or commit to fetch from the hub")] = "main"
    remote: Annotated[
        str, Meta(description="another tokenizer service: host:port, or unix:PATH of its socket; off when empty")
    ] = ""
    remote_timeout_ms: Annotated[int, Meta(description="longest wait for the other service", ge=1, le=600_000)] = 5_000
    order: Annotated[tuple[BackendName, ...], Meta(description="backends in the order they are asked")] = (
        "local",
        "hub",
        "remote",
    )
    threads: Annotated[int, Meta(description="threads that tokenize; 0: one per core", ge=0, le=256)] = 0
    max_models: Annotated[int, Meta(description="tokenizers kept loaded; the least used goes first", ge=1)] = 32
    max_model_bytes: Annotated[
        int, Meta(description="tokenizer.json bytes of all loaded models; the least used goes first", ge=1)
    ] = 512 * 2**20
    prefix_cache_bytes: Annotated[
        int, Meta(description="memory for text already tokenized, all models together; 0 turns it off", ge=0)
    ] = 128 * 2**20
    max_prompt_bytes: Annotated[int, Meta(description="longest prompt, UTF-8 bytes", ge=1)] = 16 * 2**20
    max_messages: Annotated[int, Meta(description="most messages of one chat", ge=1)] = 10_000
    max_template_bytes: Annotated[int, Meta(description="longest chat template of a request", ge=1)] = 256 * 2**10
    request_templates: Annotated[bool, Meta(description="accept chat templates that requests bring")] = False
    template_seconds: Annotated[
        float,
        Meta(
            description="longest rendering of a chat template; of a request's own, in processor time, after which its "
            "process is killed",
            gt=0,
        ),
    ] = 2.0
    request_template_processes: Annotated[
        int, Meta(description="processes that render templates of requests; more requests wait", ge=1, le=64)
    ] = 1
    request_template_bytes: Annotated[
        int, Meta(description="memory of such a process; one that needs more is killed", ge=32 * 2**20)
    ] = 256 * 2**20
    request_template_wait_seconds: Annotated[
        float, Meta(description="longest wait for a request's own template, for a free process and the text", gt=0)
    ] = 10.0
    content_format: Annotated[
        Literal["auto", "string", "openai"],
        Meta(description="how templates get message content: text, or a list of parts; auto reads the template"),
    ] = "auto"
