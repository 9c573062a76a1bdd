"""Publishes KV events as an engine does (:mod:`kvatlas.bridge.engines.publisher`)."""

from kvatlas.bridge.engines.publisher import EnginePublisher

__all__ = ["EnginePublisher"]
