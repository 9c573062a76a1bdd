"""The gateway's demonstration: Envoy, picker, pipeline and simulated engines; chats must go where their prefix is.

Conversations run turn by turn through a real Envoy. Every answer says which pod gave it and how many tokens it had
cached; the picker says what it predicted. Both are checked, and so is that no request failed.
"""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.gateway.config import GatewayOptions, document
from kvatlas.deploy.gateway.envoy import Envoy
from kvatlas.deploy.gateway.tiny_tokenizer import text, write_tokenizer
from kvatlas.deploy.processes import child
from kvatlas.deploy.processes.launcher import Launcher
from kvatlas.deploy.processes.supervisor import Child, Kept, stop_all
from kvatlas.deploy.processes.vllm_fleet import VllmFleet
from kvatlas.deploy.sim.fleet import Fleet
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.deploy.sim.serving import ServedFleet
from kvatlas.scorer.client import ScorerClient
from kvatlas.scorer.gateway.options import PickerSettings
from kvatlas.scorer.picker.names import REQUEST_ID
from kvatlas.scorer.tokenization.options import TokenizerSettings

_READY_SECONDS: Final = 180.0
_DRAIN_SECONDS: Final = 90.0
_POLL_SECONDS: Final = 0.05
_REQUEST_SECONDS: Final = 60.0
#: Requests at a time; vLLM shares two cores with everything else.
_AT_A_TIME: Final = 16
_AT_A_TIME_VLLM: Final = 4
#: Response header with the address that answered.
_SERVED: Final = "x-demo-served"


class DemoGatewayError(KvatlasError):
    """The demonstration did not end as it must; the text says where."""


class Answer(NamedTuple):
    """What came back for one request.

    Attributes:
        pod: that answered.
        prompt_tokens, cached_tokens: by the engine's word.
        seconds: until the whole answer was there.
        text: of the answer.
    """

    pod: str
    prompt_tokens: int
    cached_tokens: int
    seconds: float
    text: str


class Turn(NamedTuple):
    """One turn of a conversation, and where it should have gone."""

    conversation: int
    turn: int
    before: str
    answer: Answer

    @property
    def request_id(self) -> str:
        """The request's id."""
        return f"demo-{self.turn}-{self.conversation}"

    @property
    def stayed(self) -> bool:
        """Whether a later turn went to the pod that holds the earlier ones."""
        return not self.before or self.before == self.answer.pod


class Places(NamedTuple):
    """Where the parts are, for others to look at.

    Attributes:
        engines: URLs of the engines' APIs.
        kafka: how to reach Kafka.
        scorer, picker_metrics: host:port.
    """

    engines: list[str]
    kafka: KafkaSettings
    scorer: str
    picker_metrics: str


class DemoGateway:
    """Everything of the demonstration, on this machine.

    Args:
        sections: settings of the services.
        sim: settings of the fleet.
        state_dir: logs and tables.
        vllm: the command ``vllm`` whose servers take the simulated engines' place; None for simulated ones.
    """

    def __init__(self, sections: dict[str, Any], sim: SimPlan, state_dir: Path, *, vllm: Path | None = None) -> None:
        self._sections = dict(sections)
        self._sim = sim
        self._state_dir = state_dir
        self._model_dir = state_dir / "model"
        self._fleet: Fleet | VllmFleet = Fleet(sim, clock=time.time, monotonic=time.monotonic)
        if vllm is not None:
            self._fleet = VllmFleet(vllm, state_dir, sim.model)
        self._served: ServedFleet | VllmFleet | None = None
        self._launcher: Launcher | None = None
        self._picker: Kept | None = None
        self._parts: dict[str, Any] = {}
        self._envoy: Envoy | None = None
        self._rng = random.Random(sim.seed)  # noqa: S311 - text, not secrets

    # --- life -------------------------------------------------------------------------------------------------------

    def start(self, stop: threading.Event) -> bool:
        """Start everything; False when ``stop`` was set before it was ready.

        Raises:
            KvatlasError: a part ended or was not ready in time.
        """
        self._state_dir.mkdir(parents=True, exist_ok=True)
        write_tokenizer(self._model_dir)
        tokenizer = TokenizerSettings(models=(f"{self._sim.model}={self._model_dir}",))
        self._fleet.start()
        served = self._serve(tokenizer)
        bridge = msgspec.structs.replace(self._sections["bridge"], engines=self._fleet.engines)
        sections = {**self._sections, "bridge": bridge, "tokenizer": tokenizer}
        self._launcher = Launcher(sections, self._state_dir, use_embedded=True)
        if not self._launcher.start(stop):
            return False
        self._start_picker(served, tokenizer)
        self._envoy = Envoy(
            document(
                GatewayOptions(
                    kind="override",
                    pickers=[self._picker_address(stop)],
                    pods=list(served.addresses.values()),
                    observe=True,
                    served_header=_SERVED,
                    picker_timeout_ms=int(_REQUEST_SECONDS * 1e3),
                )
            ),
            self._state_dir,
        )
        self._envoy.start()
        self._until(lambda: self._envoy is not None and self._envoy.healthy_pickers > 0, "Envoy sees the picker", stop)
        return not stop.is_set()

    def _serve(self, tokenizer: TokenizerSettings) -> ServedFleet | VllmFleet:
        if isinstance(self._fleet, VllmFleet):
            self._served = self._fleet  # serves by itself
        else:
            self._served = ServedFleet(self._fleet, tokenizer)
            self._served.start()
        return self._served

    def _start_picker(self, served: ServedFleet | VllmFleet, tokenizer: TokenizerSettings) -> None:
        assert self._launcher is not None
        given: PickerSettings = self._sections["picker"]
        picker = msgspec.structs.replace(
            given, listen="127.0.0.1:0", endpoints=served.endpoints(), telemetry_listen="127.0.0.1:0", drain_seconds=0.0
        )
        scorer = msgspec.structs.replace(self._sections["scorer"], outcome_delay_ms=0.0, telemetry_listen="")
        parts = self._parts = {
            "kafka": self._launcher.kafka,
            "log": self._sections["log"],
            "picker": picker,
            "scorer": scorer,
            "tokenizer": tokenizer,
        }
        log = self._state_dir / "picker.log"
        self._picker = Kept("picker", lambda told: Child("picker", child.document("picker", parts, restarts=told), log))

    def _picker_address(self, stop: threading.Event) -> str:
        picker = self._picker
        assert picker is not None
        self._until(picker.child.ready.is_set, "the picker is ready", stop)
        address = picker.child.address("picker")
        # The gateway keeps the address: the next process listens where this one does.
        self._parts["picker"] = msgspec.structs.replace(self._parts["picker"], listen=address)
        return address

    def stop(self) -> None:
        """Stop everything."""
        if self._envoy is not None:
            self._envoy.stop()
        if self._picker is not None:
            stop_all([self._picker.child])
        if self._launcher is not None:
            self._launcher.stop()
        if self._served is not None:
            self._served.close()
        self._fleet.close()

    def _check(self) -> None:
        if self._picker is not None:
            self._picker.look()
        engines = self._fleet if isinstance(self._fleet, VllmFleet) else None
        for part in (self._launcher, self._envoy, engines):
            if part is not None:
                part.check()

    def _until(self, true: Callable[[], bool], what: str, stop: threading.Event) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while not stop.is_set() and not true():
            self._check()
            if time.monotonic() > deadline:
                raise DemoGatewayError(f"{what}: not within {_READY_SECONDS:g} s; logs are in {self._state_dir}")
            stop.wait(_POLL_SECONDS)

    # --- traffic ----------------------------------------------------------------------------------------------------

    def turns(self, conversations: int, turns: int, stop: threading.Event) -> Iterator[Turn]:
        """Run conversations, all of a turn at once, each turn after the index has the one before.

        Raises:
            DemoGatewayError: a request failed, or the index does not catch up.
        """
        system = [text(self._rng, 1_500) for _ in range(2)]
        histories: list[list[dict[str, str]]] = [
            [{"role": "system", "content": system[number % len(system)]}] for number in range(conversations)
        ]
        homes = [""] * conversations
        at_a_time = _AT_A_TIME_VLLM if isinstance(self._fleet, VllmFleet) else _AT_A_TIME
        with ThreadPoolExecutor(min(conversations, at_a_time)) as pool:
            for turn in range(turns):
                for history in histories:
                    history.append({"role": "user", "content": text(self._rng, 400)})
                streams = [(turn + number) % 2 == 0 for number in range(conversations)]
                names = [f"demo-{turn}-{number}" for number in range(conversations)]
                for number, answer in enumerate(pool.map(self.ask, names, histories, streams)):
                    yield Turn(number, turn, homes[number], answer)
                    homes[number] = answer.pod
                    histories[number].append({"role": "assistant", "content": answer.text})
                self.drain(stop)
                if stop.is_set():
                    return

    def drain(self, stop: threading.Event) -> None:
        """Wait until the scorer knows every message that was published.

        Raises:
            DemoGatewayError: it does not catch up.
        """
        deadline = time.monotonic() + _DRAIN_SECONDS
        while not stop.is_set():
            known = self.known_pods()
            if all(known.get(pod.pod, -1) >= pod.sequence for pod in self._fleet.status()):
                return
            self._check()
            if time.monotonic() > deadline:
                raise DemoGatewayError(f"the index did not catch up in {_DRAIN_SECONDS:g} s")
            stop.wait(_POLL_SECONDS)

    def known_pods(self) -> dict[str, int]:
        """Return the pods that the scorer knows, with the last sequence of each."""
        assert self._launcher is not None
        with ScorerClient(self._launcher.scorer, timeout_seconds=5) as scorer:
            return {pod.pod: pod.last_sequence for pod in scorer.list_pods()}

    def ask(self, name: str, messages: list[dict[str, str]], stream: bool) -> Answer:
        """Send a chat through Envoy, under a request id.

        Raises:
            DemoGatewayError: there was no answer.
        """
        assert self._envoy is not None
        body: dict[str, Any] = {"model": self._sim.model, "messages": messages, "max_tokens": 24, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        request = urllib.request.Request(
            f"http://{self._envoy.address}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"content-type": "application/json", REQUEST_ID: name},
        )
        began = time.monotonic()
        try:
            with urllib.request.urlopen(request, timeout=_REQUEST_SECONDS) as answer:  # noqa: S310 - as above
                data = answer.read()
                pod = self._pod_at(answer.headers.get(_SERVED, ""))
        except (urllib.error.URLError, OSError) as error:
            raise DemoGatewayError(f"a request through Envoy failed: {error}") from error
        said, usage = _streamed(data) if stream else _whole(data)
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return Answer(pod, usage["prompt_tokens"], cached, time.monotonic() - began, said)

    def places(self) -> Places:
        """Return where everything is, once started."""
        assert self._launcher is not None
        assert self._served is not None
        assert self._picker is not None
        urls = [f"http://{address}" for address in self._served.addresses.values()]
        return Places(urls, self._launcher.kafka, self._launcher.scorer, self._picker.child.address("metrics"))

    def _pod_at(self, address: str) -> str:
        served = self._served.addresses if self._served is not None else {}
        return next((pod for pod, one in served.items() if one == address), address)

    def judged(self, requests: int, stop: threading.Event) -> dict[str, str]:
        """Return each request's verdict, once all were judged, by reading ``kv-decisions``.

        Raises:
            DemoGatewayError: not all are judged in time.
        """
        from kvatlas.deploy.gateway.verdicts import verdicts  # noqa: PLC0415 - reads Kafka

        assert self._launcher is not None
        kafka = self._launcher.kafka
        deadline = time.monotonic() + _DRAIN_SECONDS
        found: dict[str, str] = {}
        while not stop.is_set():
            found = verdicts(kafka)
            if len(found) >= requests:
                return found
            if time.monotonic() > deadline:
                raise DemoGatewayError(f"{len(found)} of {requests} requests were judged")
            stop.wait(0.5)
        return found


def _whole(data: bytes) -> tuple[str, dict[str, Any]]:
    document_ = json.loads(data)
    return document_["choices"][0]["message"]["content"] or "", document_["usage"]


def _streamed(data: bytes) -> tuple[str, dict[str, Any]]:
    said = ""
    usage: dict[str, Any] = {}
    for line in data.splitlines():
        if not line.startswith(b"data:") or line.endswith(b"[DONE]"):
            continue
        event = json.loads(line[5:])
        usage = event.get("usage") or usage
        said += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    return said, usage
