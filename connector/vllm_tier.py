"""The file tier as vLLM loads it by its configured path (:mod:`kvatlas.connector.vllm.tier`)."""

from kvatlas.connector.vllm.tier import FileTierManager

__all__ = ["FileTierManager"]
