"""What a tokenizer's class in transformers makes of ``tokenizer.json``: rebuilt post-processors and pre-tokenizers.

``tokenizer.json`` says nearly everything, and some classes of transformers do not leave it at that:

* Up to 4.57, five classes replace the post-processor by one of their own, from ``add_bos_token`` and ``add_eos_token``
  of ``tokenizer_config.json`` (where these are absent, from the class's defaults), whatever ``tokenizer.json`` says.
* From 5 on the two flags are not looked at; yet ``LlamaTokenizer`` builds normalizer and pre-tokenizer anew, unless the
  model's type is one whose class is known to be wrong or is registered without a class of its own.

Sources: ``tokenization_auto.py`` and the ``tokenization_*_fast.py`` of transformers 4.57.1; ``tokenization_auto.py``,
``tokenization_utils_tokenizers.py`` and ``tokenization_llama.py`` of 5.17.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from kvatlas.scorer.tokenization.files import ModelFiles

Transformers = Literal["4", "5"]


def _words(text: str) -> list[str]:
    return text.split()


#: Class -> whether it adds a beginning and an end token where the configuration does not say.
_REBUILDING: Final[Mapping[str, tuple[bool, bool]]] = {
    "LlamaTokenizer": (True, False),
    "CodeLlamaTokenizer": (True, False),
    "GemmaTokenizer": (True, False),
    "CohereTokenizer": (True, False),
    "GPTNeoXTokenizer": (False, False),
}
#: Model types by the class that 4.57 takes where ``tokenizer_config.json`` names none.
_CLASS_OF_TYPE: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        [
            "arcee",
            "aria",
            "chameleon",
            "colpali",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_vl",
            "deepseek_vl_hybrid",
            "diffllama",
            "ernie4_5",
            "ernie4_5_moe",
            "idefics",
            "idefics2",
            "idefics3",
            "jamba",
            "janus",
            "jetmoe",
            "llama",
            "llama4",
            "llama4_text",
            "llava",
            "llava_next",
            "llava_next_video",
            "llava_onevision",
            "mistral",
            "mixtral",
            "mllama",
            "paligemma",
            "persimmon",
            "phi3",
            "phimoe",
            "video_llava",
            "vipllava",
            "zamba",
            "zamba2",
        ],
        "LlamaTokenizer",
    ),
    **dict.fromkeys(
        [
            "gemma",
            "gemma2",
            "gemma3",
            "gemma3_text",
            "gemma3n",
            "gemma3n_text",
            "recurrent_gemma",
            "shieldgemma2",
            "siglip2",
            "t5gemma",
        ],
        "GemmaTokenizer",
    ),
    **dict.fromkeys(["aya_vision", "cohere", "cohere2"], "CohereTokenizer"),
    **dict.fromkeys(
        _words("""falcon_mamba gpt_neox mamba mamba2 mpt olmo olmo2 olmoe rwkv stablelm xlstm"""),
        "GPTNeoXTokenizer",
    ),
    "code_llama": "CodeLlamaTokenizer",
}
#: Model types for which 5.x takes tokenizer.json as it is, whatever class is named.
_AS_IT_IS: Final = frozenset(
    [
        "EvollaModel",
        "arctic",
        "aria",
        "bigbird_pegasus",
        "camembertv2-base",
        "canary",
        "chameleon",
        "chatlm",
        "cohere_asr",
        "deepseek_ocr",
        "deepseek_ocr2",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "deepseek_v4",
        "deepseek_vl",
        "deepseek_vl_hybrid",
        "deepseek_vl_v2",
        "ernie4_5",
        "ernie4_5_moe",
        "flex_olmo",
        "fuyu",
        "glm",
        "glm4",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v",
        "glm4v_moe",
        "glm_image",
        "glmasr",
        "got_ocr2",
        "gpt_bigcode",
        "granite",
        "granitemoe",
        "granitemoehybrid",
        "granitemoeshared",
        "h2ovl_chat",
        "hyperclovax",
        "hyperclovax_vlm",
        "internlm2",
        "jamba",
        "janus",
        "kimi_k25",
        "kimi_linear",
        "kosmos-2",
        "llava",
        "llava_next",
        "mimo_v2_flash",
        "minicpm3",
        "minicpmv",
        "minicpmv4_6",
        "minimax_m2",
        "ministral",
        "ministral3",
        "mistral",
        "mistral3",
        "mixtral",
        "modernbert",
        "molmo",
        "molmo2",
        "nemotron",
        "nvfp4",
        "nystromformer",
        "olmo2",
        "olmo3",
        "olmo_hybrid",
        "opencua",
        "openvla",
        "paddleocr_vl",
        "pegasus_x",
        "persimmon",
        "phi3",
        "phi3_v",
        "phimoe",
        "pix2struct",
        "pixtral",
        "qwen2",
        "smolvlm",
        "stablelm",
        "step3_vl",
        "step3p5",
        "umt5",
        "vipllava",
        "vision-encoder-decoder",
        "voxtral",
        "voxtral_realtime",
        "xlm-roberta-xl",
    ]
)


def tokenizer_document(files: ModelFiles, transformers: Transformers) -> str:
    """Return the text of ``tokenizer.json`` as the class of transformers reads it.

    Raises:
        msgspec.MsgspecError: it is not JSON.
    """
    rebuilt = (
        transformers == "5"
        and _named(files) == "LlamaTokenizer"
        and files.model_config.get("model_type") not in _AS_IT_IS
    )
    if not rebuilt:
        return files.tokenizer
    document: dict[str, Any] = msgspec.json.decode(files.tokenizer)
    model = document.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        return files.tokenizer
    prefix = files.config.get("add_prefix_space")
    scheme = "never" if prefix is False else "always" if files.config.get("legacy") else "first"
    document["model"] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": model.get("vocab"),
        "merges": model.get("merges"),
    }
    document["normalizer"] = None
    document["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "\N{LOWER ONE EIGHTH BLOCK}",
        "prepend_scheme": scheme,
        "split": False,
    }
    return msgspec.json.encode(document).decode()


def set_post_processor(tokenizer: Tokenizer, files: ModelFiles, transformers: Transformers) -> None:
    """Replace the post-processor where the class of transformers replaces it."""
    if transformers != "4":
        return
    name = _named(files) or _CLASS_OF_TYPE.get(str(files.model_config.get("model_type")), "")
    if name not in _REBUILDING:
        return
    tokens = []
    for field, default in zip(("bos", "eos"), _REBUILDING[name], strict=True):
        flag = files.config.get(f"add_{field}_token")
        text = files.special_tokens.get(f"{field}_token")
        number = tokenizer.token_to_id(text) if text is not None else None
        wanted = default if flag is None else bool(flag)
        tokens.append((text, number) if wanted and text is not None and number is not None else None)
    begin, end = tokens
    # As lists of pieces: token texts may hold blanks, which a template in one text would be cut at.
    single = [*([f"{begin[0]}:0"] if begin else []), "$A:0", *([f"{end[0]}:0"] if end else [])]
    pair = [*single, *([f"{begin[0]}:1"] if begin else []), "$B:1", *([f"{end[0]}:1"] if end else [])]
    post_processor: Any = TemplateProcessing(
        single=single, pair=pair, special_tokens=[token for token in tokens if token is not None]
    )
    tokenizer.post_processor = post_processor


def _named(files: ModelFiles) -> str:
    return str(files.config.get("tokenizer_class") or "").removesuffix("Fast")
