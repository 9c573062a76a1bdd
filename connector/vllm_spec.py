"""The offloading spec as vLLM loads it by its configured path (:mod:`kvatlas.connector.vllm.spec`)."""

from kvatlas.connector.vllm.spec import FileOffloadingSpec

__all__ = ["FileOffloadingSpec"]
