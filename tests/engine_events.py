"""Events as engines publish them, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def stored(
    hashes: Sequence[int | bytes],
    tokens: Sequence[int],
    size: int = 16,
    parent: int | bytes | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return a BlockStored event in the newest layout."""
    return {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": parent,
        "token_ids": list(tokens),
        "block_size": size,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        **more,
    }


def removed(hashes: Sequence[int | bytes], medium: str = "GPU", **more: Any) -> dict[str, Any]:
    """Return a BlockRemoved event in the newest layout."""
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": medium, **more}
