"""Prompts come out as vLLM itself renders and tokenizes them, and what it refuses is refused."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from kvatlas.scorer.errors import InputError
from kvatlas.scorer.tokenization import requests
from kvatlas.scorer.tokenization.errors import TokenizeInputError
from kvatlas.scorer.tokenization.limits import TokenizerLimits
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.tokenization.pool import TokenizerPool
from kvatlas.scorer.tokenization.records import Encoded

DATA = Path(__file__).parents[2] / "data"
FOLDER = DATA / "tokenizer"
GOLDENS: dict[str, dict[str, Any]] = json.loads((DATA / "goldens" / "chat.json").read_text())
CHATS = {name: case for name, case in GOLDENS.items() if case["engine"] == "vllm"}
TEXTS = {name: case for name, case in CHATS.items() if not name.startswith(("harmony_", "mm_"))}
HARMONY = {name: case for name, case in CHATS.items() if name.startswith("harmony_")}
PICTURES = {name: case for name, case in CHATS.items() if name.startswith("mm_")}
CLASSES = {name: case for name, case in GOLDENS.items() if case["engine"] == "transformers"}


def _pool(case: dict[str, Any], folder: Path = FOLDER, **settings: Any) -> TokenizerPool:
    return TokenizerPool(
        TokenizerSettings(
            models=(f"tiny={folder}",),
            engine_args=(f"tiny={shlex.join(case['flags'])}",),
            request_templates="--trust-request-chat-template" in case["flags"],
            **settings,
        ),
        limits=TokenizerLimits(template_wait_seconds=90.0),
    )


def _read(case: dict[str, Any], **more: Any) -> list[requests.EngineRequest]:
    shape = requests.shape_of(case["path"].partition(",")[0])
    assert shape is not None
    return requests.read(shape, {**case["request"], **more})


async def _encoded(pool: TokenizerPool, case: dict[str, Any], **more: Any) -> list[Encoded]:
    return [await pool.tokens_of("tiny", prompt) for prompt in _read(case, **more)]


def test_every_golden_is_played() -> None:
    """No case is left out: 165 of HTTP renderings and Harmony, and the tokenizer classes."""
    assert len(TEXTS) + len(HARMONY) + len(PICTURES) + len(CLASSES) == len(GOLDENS)
    assert len(CHATS) == 140
    assert len(CLASSES) == 96


@pytest.mark.parametrize("name", TEXTS)
async def test_prompts_equal_vllm(name: str) -> None:
    """Token ids and text are vLLM's; a status of 400 there is a refusal here."""
    case = CHATS[name]
    async with _pool(case) as pool:
        if case["status"] != 200:
            with pytest.raises(InputError):
                await _encoded(pool, case)
            return
        encoded = await _encoded(pool, case)
        texts = [await pool.text_of("tiny", one.ids) for one in encoded]
    several = isinstance(case["text"], list)
    assert [one.list() for one in encoded] == (case["token_ids"] if several else [case["token_ids"]])
    assert texts == (case["text"] if several else [case["text"]])


@pytest.mark.parametrize("name", HARMONY)
async def test_harmony_equals_vllm(name: str, tmp_path: Path) -> None:
    """Chats of gpt-oss are rendered by Harmony, with the date that the engine is given."""
    case = CHATS[name]
    folder = _folder(tmp_path, {"model_type": "gpt_oss"})
    async with _pool({**case, "flags": []}, folder, harmony_date="2026-11-28") as pool:
        [encoded] = await _encoded(pool, case)
        assert encoded.list() == case["token_ids"]
        assert await pool.text_of("tiny", encoded.ids) == case["text"]


def _folder(tmp_path: Path, config: dict[str, Any], **tokenizer_config: Any) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(FOLDER, folder)
    (folder / "config.json").write_text(json.dumps(config))
    kept = json.loads((FOLDER / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**kept, **tokenizer_config}))
    return folder


_VISION = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
_VISION_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for content in message.content %}"
    "{% if content.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("name", PICTURES)
async def test_pictures_equal_vllm(name: str, tmp_path: Path) -> None:
    """With the items' places a chat with pictures has vLLM's ids; without them it is refused, not guessed."""
    case = CHATS[name]
    added = {str(1524 + n): {"content": text, "special": True} for n, text in enumerate(_VISION)}
    folder = _folder(tmp_path, {"model_type": "qwen2_vl", "image_token_id": 1527}, added_tokens_decoder=added)
    (folder / "chat_template.jinja").write_text(_VISION_TEMPLATE)
    hashes, places = (case["features"][field]["image"] for field in ("mm_hashes", "mm_placeholders"))
    items = [{"identifier": identifier, **place} for identifier, place in zip(hashes, places, strict=True)]
    async with _pool(case, folder) as pool:
        [encoded] = await _encoded(pool, case, multimodal=items)
        assert encoded.list() == case["token_ids"]
        with pytest.raises(TokenizeInputError, match="render endpoint"):
            await _encoded(pool, case)
        moved = [{**item, "offset": item["offset"] + 1} for item in items]
        with pytest.raises(TokenizeInputError, match="no placeholder"):
            await _encoded(pool, case, multimodal=moved)


@pytest.mark.parametrize("name", PICTURES)
def test_render_answers_are_taken(name: str) -> None:
    """What vLLM's render endpoint answers is a request of its own: ids, and items by their places."""
    case = CHATS[name]
    answer = {"model": "tiny", "token_ids": case["token_ids"], "features": case["features"], "cache_salt": "s"}
    [request] = requests.read(requests.shape_of_body(answer), answer)
    assert request.tokens is not None
    assert Encoded(request.tokens).list() == case["token_ids"]
    assert [place.identifier for place in request.multimodal] == case["features"]["mm_hashes"]["image"]
    assert request.multimodal[0].offset == case["features"]["mm_placeholders"]["image"][0]["offset"]
    assert request.cache_salt == "s"


@pytest.mark.parametrize("transformers", ["4", "5"])
@pytest.mark.parametrize("name", CLASSES)
async def test_tokenizer_classes_equal_transformers(name: str, transformers: str, tmp_path: Path) -> None:
    """Beginning and end tokens, and pre-tokenizers built anew, are those of the class in each version."""
    case = CLASSES[name]
    config = {field: value for field, value in case["config"].items() if field != "model_type"}
    folder = _folder(
        tmp_path, {"model_type": case["config"]["model_type"]} if case["config"]["model_type"] else {}, **config
    )
    if name.startswith("bos/bytelevel"):
        document = json.loads((folder / "tokenizer.json").read_text())
        document["post_processor"] = {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": False,
            "use_regex": True,
        }
        (folder / "tokenizer.json").write_text(json.dumps(document))
    async with _pool({"flags": []}, folder, transformers=transformers) as pool:
        encoded = await pool.encode("tiny", case["request"]["prompt"])
    for version, wanted in case["token_ids"].items():
        if version.startswith(transformers):
            assert encoded.list() == wanted, version
