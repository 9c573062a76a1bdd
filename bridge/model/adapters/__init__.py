"""One module per engine: its wire format as a table of fields.

An adapter is a module with ``NAME`` and ``decode(payload, limits) -> Batch``. Adding an engine is one module and
one entry in :data:`ADAPTERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model.adapters import sglang, tensorrt, vllm
from kvatlas.bridge.model.events import Batch, Limits

#: Engines whose clear also empties their host memory; elsewhere it is the GPU's reset alone.
CLEARS_HOST: Final = frozenset({sglang.NAME})
#: Engines that hash an adapter's id: once it is loaded anew, other keys stand for blocks of the same name.
ADAPTER_IDS_HASHED: Final = frozenset({sglang.NAME})
#: Engines that hold a block once per tier and name: one that is announced again has a name that the event hides.
HASHES_HIDE_NAMES: Final = frozenset({sglang.NAME})

Decode = Callable[[bytes, Limits], Batch]

ADAPTERS: Final[Mapping[str, Decode]] = {
    vllm.NAME: vllm.decode,
    sglang.NAME: sglang.decode,
    tensorrt.NAME: tensorrt.decode,
}


def adapter(engine: str) -> Decode:
    """Return the decoder of an engine by name.

    Raises:
        WireError: no adapter has that name.
    """
    try:
        return ADAPTERS[engine]
    except KeyError:
        known = ", ".join(sorted(ADAPTERS))
        raise WireError(f"no adapter for engine {engine!r}; known engines: {known}") from None
