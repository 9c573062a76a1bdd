"""A whole ``OffloadingSpec`` for vLLM: GPU -> pinned host memory -> verified files.

Configured with ``kv_connector_extra_config``::

    {"spec_name": "FileOffloadingSpec", "spec_module_path": "kvatlas.connector.vllm_spec",
     "cpu_bytes_to_use": N, "root_dir": "/mnt/kv", "file_tier": {"max_bytes": M}}

vLLM asserts that a load to the GPU succeeds, so a lookup must not say HIT before the bytes are sure. The tiering
manager keeps to that: a block of the files is brought to host memory first, where its checksum is verified, and only
what arrived there is a HIT; what did not is a MISS and is computed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from kvatlas.bridge.errors import SettingsError
from kvatlas.connector.vllm.version import check_version

check_version()

from vllm.v1.kv_offload.base import OffloadingMetricMetadata  # noqa: E402 - version first
from vllm.v1.kv_offload.config import OffloadingConfig  # noqa: E402
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec  # noqa: E402

_TIER: Final = {"type": "FileTierManager", "module_path": "kvatlas.connector.vllm_tier"}


def with_file_tier(extra_config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with our file tier as its only secondary tier.

    Raises:
        SettingsError: ``root_dir`` is missing, or other secondary tiers are named too.
    """
    known = dict(extra_config)
    if not known.get("root_dir"):
        raise SettingsError("kv_connector_extra_config: root_dir is missing; name the folder for KV files")
    if known.get("secondary_tiers"):
        raise SettingsError("kv_connector_extra_config: use TieringOffloadingSpec to name secondary_tiers yourself")
    known["secondary_tiers"] = [{**_TIER, "root_dir": known["root_dir"], **known.get("file_tier", {})}]
    return known


class FileOffloadingSpec(TieringOffloadingSpec):  # type: ignore[misc]
    """vLLM's host tier in front of our file tier."""

    def __init__(self, config: OffloadingConfig) -> None:
        super().__init__(replace(config, extra_config=with_file_tier(dict(config.extra_config))))

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        """Return the metrics of the host tier and of ours."""
        found: dict[str, OffloadingMetricMetadata] = super().build_metric_definitions(with_file_tier(extra_config))
        return found

    @classmethod
    def config_info_keys(cls, extra_config: dict[str, Any]) -> tuple[str, ...]:
        """Return the label names of the configuration's info metric."""
        names: tuple[str, ...] = super().config_info_keys(with_file_tier(extra_config))
        return names
