"""The fleet: what it publishes, what it says is true, and that both agree."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import zmq

from kvatlas.bridge.engines.discovery import read_engines
from kvatlas.bridge.engines.spec import parse_engine
from kvatlas.bridge.model import block_key
from kvatlas.bridge.model.adapters import vllm
from kvatlas.bridge.model.adapters.fields import encode_batch
from kvatlas.bridge.model.events import Cleared, Limits, Removed, Stored, Tier
from kvatlas.deploy.sim.errors import UnknownPodError
from kvatlas.deploy.sim.fleet import Fleet
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.deploy.sim.truth import TruthServer
from tests.waiting import wait_until

MODEL = "sim-model"


class Recorder:
    """A publisher that keeps the payload of every batch, in the place of the ZMQ sockets."""

    def __init__(self, endpoint: str, replay_endpoint: str) -> None:
        self.endpoint = endpoint
        self.replay_endpoint: str | None = replay_endpoint
        self.payloads: list[bytes] = []

    def start(self) -> None: ...

    def close(self) -> None: ...

    def publish(self, events: Sequence[Mapping[str, Any]], *, timestamp: float, dp_rank: int | None = 0) -> int:
        self.payloads.append(encode_batch(timestamp, list(events), dp_rank))
        return len(self.payloads) - 1


class Recorders:
    """Makes recorders and keeps all of them, in the order in which pods started."""

    def __init__(self) -> None:
        self.made: list[Recorder] = []

    def __call__(self, live: str, replay: str) -> Recorder:
        self.made.append(Recorder(live, replay))
        return self.made[-1]


def fleet_of(recorders: Recorders | None = None, **options: Any) -> Fleet:
    settings = SimPlan(**{"pods": 3, "blocks": 200, "sessions": 12, **options})
    fleet = Fleet(settings, clock=time.time, monotonic=time.monotonic, publisher=recorders or Recorders())
    fleet.start()
    return fleet


def fold(payloads: list[bytes], size: int = 16) -> dict[str, set[str]]:
    """Rebuild tier -> canonical keys from a pod's messages, by counting announcements."""
    name: dict[bytes, bytes] = {}
    copies: Counter[tuple[Tier, bytes]] = Counter()
    for payload in payloads:
        batch = vllm.decode(payload, Limits())
        assert not batch.rejected
        for event in batch.events:
            if isinstance(event, Stored):
                if event.tokens:
                    root = block_key.root_key(MODEL, event.lora, event.cache_salt)
                    parent = root if event.parent is None else name[event.parent]
                    keys = block_key.block_keys(parent, event.tokens, size)
                    name.update(zip(event.keys, keys, strict=True))
                copies.update((event.tier, key) for key in event.keys)
            elif isinstance(event, Removed):
                copies.subtract((event.tier, key) for key in event.keys)
            elif isinstance(event, Cleared):
                copies = Counter({held: count for held, count in copies.items() if held[0] != Tier.GPU})
    assert min(copies.values(), default=0) >= 0
    return {
        text: {name[key].hex() for (tier, key), count in copies.items() if tier == wanted and count}
        for text, wanted in (("gpu", Tier.GPU), ("cpu", Tier.CPU))
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cpu_blocks": 150, "salted_share": 0.5, "lora_share": 0.5},
        {"blocks": 80, "clear_probability": 0.05, "max_running": 2},
        {"restart_probability": 0.03},
    ],
)
def test_the_truth_is_what_the_events_say(options: dict[str, Any]) -> None:
    """Folding the messages of each pod's newest process gives exactly the blocks that the truth lists."""
    recorders = Recorders()
    fleet = fleet_of(recorders, **options)
    served = fleet.serve(150)
    assert len(served) == 150
    truth = fleet.truth()
    newest = {recorder.endpoint: recorder for recorder in recorders.made}
    if options.get("restart_probability"):
        assert len(recorders.made) > 3
    else:
        for number, pod in enumerate(fleet.pods):
            assert {tier: set(keys) for tier, keys in truth[pod].items()} == fold(recorders.made[number].payloads)
            assert fleet.pod(pod).status().sequence == len(recorders.made[number].payloads) - 1
    assert newest


def test_expected_matches_walk_the_listed_blocks() -> None:
    """A prompt's expected match is the run of its block keys that the truth lists."""
    fleet = fleet_of(salted_share=0.3, lora_share=0.3, cpu_blocks=100, blocks=120)
    served = fleet.serve(120)
    truth = fleet.truth()
    matched = 0
    for request in served[-60:]:
        expected = fleet.expect(request.tokens, cache_salt=request.cache_salt, lora=request.lora)
        root = block_key.root_key(MODEL, request.lora, request.cache_salt)
        keys = [key.hex() for key in block_key.block_keys(root, block_key.pack_tokens(request.tokens), 16)]
        for pod, held in truth.items():
            blocks, score = 0, 0.0
            for key in keys:
                if key not in held["gpu"] and key not in held["cpu"]:
                    break
                blocks += 1
                score += 1.0 if key in held["gpu"] else 0.8
            matched += blocks
            if blocks:
                assert expected[pod].matched_blocks == blocks
                assert expected[pod].matched_tokens == blocks * 16
                assert expected[pod].score == pytest.approx(score)
            else:
                assert pod not in expected
    assert matched > 100


@pytest.mark.parametrize(("engine", "canonical"), [(64, 16), (16, 64)])
def test_block_sizes_of_engine_and_deployment_may_differ(engine: int, canonical: int) -> None:
    """A canonical block counts only when every engine block it needs is held."""
    fleet = fleet_of(block_size_tokens=engine, canonical_block_size_tokens=canonical, pods=1, blocks=64)
    fleet.serve(20)
    tokens = list(range(500, 500 + 321))
    fleet.pods["pod-0"].submit(fleet.serve(1)[0].__class__(tokens=tokens))
    fleet.drain()
    expected = fleet.expect(tokens)["pod-0"]
    assert expected.matched_tokens == 320
    assert expected.matched_blocks == 320 // canonical
    root = block_key.root_key(MODEL)
    keys = {key.hex() for key in block_key.block_keys(root, block_key.pack_tokens(tokens), canonical)}
    assert keys <= set(fleet.truth()["pod-0"]["gpu"])


def test_equal_seeds_make_equal_fleets() -> None:
    """Traffic, engine keys and messages depend on the seed alone."""

    def payloads(seed: int) -> list[list[bytes]]:
        recorders = Recorders()
        fleet = Fleet(SimPlan(pods=2, seed=seed), clock=lambda: 1.0, monotonic=time.monotonic, publisher=recorders)
        fleet.start()
        fleet.serve(30)
        return [recorder.payloads for recorder in recorders.made]

    assert payloads(5) == payloads(5)
    assert payloads(5) != payloads(6)


def test_another_model_never_hits() -> None:
    """A prompt for a model that the pods do not serve matches nothing."""
    fleet = fleet_of()
    request = fleet.serve(20)[-1]
    assert fleet.expect(request.tokens, cache_salt=request.cache_salt)
    assert fleet.expect(request.tokens, cache_salt=request.cache_salt, model="other") == {}


def test_a_prompt_larger_than_the_cache_is_rejected() -> None:
    """A request that could never fit is counted and does not block those behind it."""
    fleet = fleet_of(pods=1, blocks=30, system_tokens=64, turns=1)
    big, small = fleet.serve(2)
    pod = fleet.pods["pod-0"]
    before = Counter(pod.status().counts)
    pod.submit(big.__class__(tokens=list(range(1000))))
    pod.submit(small)
    fleet.drain()
    after = Counter(pod.status().counts)
    assert after["rejected"] == before["rejected"] + 1
    assert after["requests"] == before["requests"] + 1


def test_a_paused_fleet_is_silent() -> None:
    """After pause returned, nothing is published until resume, although the traffic goes on waiting."""
    recorders = Recorders()
    fleet = fleet_of(recorders, requests_per_second=2000.0)
    stop = threading.Event()
    thread = threading.Thread(target=fleet.run, args=(stop,))
    thread.start()
    try:
        wait_until(lambda: fleet.sent > 20)
        fleet.pause()
        count = sum(len(recorder.payloads) for recorder in recorders.made)
        sent = fleet.sent
        time.sleep(0.1)
        assert sum(len(recorder.payloads) for recorder in recorders.made) == count
        assert fleet.sent == sent
        fleet.resume()
        wait_until(lambda: fleet.sent > sent)
    finally:
        stop.set()
        thread.join()


def test_traffic_ends_where_the_settings_say() -> None:
    """`requests` bounds the traffic, and what runs is finished."""
    fleet = fleet_of(requests=17, requests_per_second=5000.0)
    fleet.run(threading.Event())
    assert fleet.sent == 17
    assert all(pod.running == pod.waiting == 0 for pod in fleet.status())


def test_an_unknown_pod_is_named() -> None:
    """Asking for a pod that is not there says which are."""
    with pytest.raises(UnknownPodError, match=r"pod-9.*pod-0, pod-1, pod-2"):
        fleet_of().pod("pod-9")


# --- over real sockets ------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Fleet, str]]:
    settings = SimPlan(pods=2, blocks=100, engines_file=str(tmp_path / "engines.yaml"))
    fleet = Fleet(settings, clock=time.time, monotonic=time.monotonic)
    fleet.start()
    truth = TruthServer(fleet, "127.0.0.1:0")
    truth.start()
    yield fleet, truth.address
    truth.stop()
    fleet.close()


def ask(address: str, path: str, body: object = None, method: str = "POST") -> Any:
    data = None if body is None else json.dumps(body).encode()
    question = urllib.request.Request(f"http://{address}{path}", data=data, method=method)
    with urllib.request.urlopen(question, timeout=90) as answer:
        return json.load(answer)


def test_the_endpoint_tells_what_the_fleet_knows(served: tuple[Fleet, str]) -> None:
    """`/serve`, `/expect`, `/truth` and `/pods` answer over HTTP what the fleet answers in process."""
    fleet, address = served
    requests = ask(address, "/serve?requests=20")
    question = {"tokens": requests[-1]["tokens"], "cache_salt": requests[-1]["cache_salt"]}
    expected = fleet.expect(question["tokens"], cache_salt=question["cache_salt"])
    one = ask(address, "/expect", question)
    assert one == ask(address, "/expect", [question])[0]
    assert {pod: answer["score"] for pod, answer in one.items()} == {p: e.score for p, e in expected.items()}
    assert ask(address, "/truth", method="GET") == fleet.truth()
    pods = ask(address, "/pods", method="GET")
    assert [pod["endpoint"] for pod in pods] == [engine.split(",")[0] for engine in fleet.engines]


def test_the_endpoint_disturbs_pods(served: tuple[Fleet, str]) -> None:
    """`/clear` empties a pod and announces it; `/restart` starts its sequence anew on the same ports."""
    fleet, address = served
    ask(address, "/serve?requests=30")
    before = {pod.pod: pod for pod in fleet.status()}
    ask(address, "/clear?pod=pod-0")
    ask(address, "/restart?pod=pod-1")
    after = {pod.pod: pod for pod in fleet.status()}
    assert after["pod-0"].blocks == after["pod-1"].blocks == 0
    assert after["pod-0"].sequence == before["pod-0"].sequence + 1
    assert (after["pod-1"].sequence, after["pod-1"].incarnations) == (-1, 1)
    assert after["pod-1"].endpoint == before["pod-1"].endpoint
    assert after["pod-1"].replay_endpoint == before["pod-1"].replay_endpoint


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/nothing", None, 404, "/nothing"),
        ("/clear", None, 400, "pod"),
        ("/clear?pod=nobody", None, 404, "nobody"),
        ("/expect", {"tokens": "text"}, 400, "tokens"),
        ("/serve?requests=many", None, 400, "many"),
    ],
)
def test_the_endpoint_refuses_with_a_reason(
    served: tuple[Fleet, str], path: str, body: object, status: int, text: str
) -> None:
    """A wrong question is answered with a status and a text, and the next one is served."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(served[1], path, body)
    assert caught.value.code == status
    assert text in json.load(caught.value)["error"]
    assert len(ask(served[1], "/pods", method="GET")) == 2


def test_a_subscriber_receives_what_the_pods_publish(served: tuple[Fleet, str]) -> None:
    """Live frames carry the topic `kv@pod@model`, the sequence and a batch; the bridge reads the engines' file."""
    fleet, _ = served
    listed = read_engines(Path(fleet.settings.engines_file))
    specs = [spec for engine in listed for spec in parse_engine(engine)]
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.subscribe(b"")
        socket.connect(fleet.engines[0].split(",")[0])
        publisher: Any = fleet.pod("pod-0")._publisher
        wait_until(lambda: publisher.subscribed)
        fleet.serve(20)
        assert socket.poll(90_000)
        topic, sequence, payload = socket.recv_multipart()
    assert topic == b"kv@pod-0@sim-model"
    assert int.from_bytes(sequence, "big") == 0
    assert isinstance(vllm.decode(payload, Limits()).events[0], Stored)
    assert [spec.live for spec in specs] == [engine.split(",")[0] for engine in fleet.engines]
    assert [(spec.pod, spec.model) for spec in specs] == [("pod-0", "sim-model"), ("pod-1", "sim-model")]
