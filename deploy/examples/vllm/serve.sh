#!/bin/sh
# One vLLM on this machine, with the events that kvatlas reads and the connector. Needs vLLM and `pip install
# 'kvatlas[connector]'` in one environment. Beside it: kvatlas up --bridge-engines \
#   tcp://127.0.0.1:5557,tcp://127.0.0.1:5558
set -eu
MODEL=${MODEL:-Qwen/Qwen3-0.6B}
POD=${POD:-$(hostname)}
KV_ROOT=${KV_ROOT:-/var/tmp/kvatlas-kv}
mkdir -p "$KV_ROOT"
# vLLM takes its hash seed from here; every engine must have the same.
export PYTHONHASHSEED=${PYTHONHASHSEED:-0}
# An endpoint with a star is one that vLLM binds; any other it connects to.
exec vllm serve "$MODEL" --enable-prefix-caching --block-size 16 --prefix-caching-hash-algo sha256_cbor \
    --kv-events-config '{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:5557",
        "replay_endpoint": "tcp://*:5558", "topic": "kv@'"$POD@$MODEL"'", "buffer_steps": 20000}' \
    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config":
        {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 4294967296,
        "hash_algorithm": "sha256_cbor", "secondary_tiers": [
        {"type": "FileTierManager", "module_path": "kvatlas.connector.vllm_tier", "root_dir": "'"$KV_ROOT"'",
         "max_percent": 50, "locality": "LOCAL"}]}}' "$@"
