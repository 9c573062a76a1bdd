"""Captures, moments, summaries and filters of the log."""

import gzip
import io
import json
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas.bridge.errors import SettingsError, WireError
from kvatlas.bridge.model import block_key, topics
from kvatlas.bridge.model.adapters import adapter
from kvatlas.bridge.model.events import Cleared, Limits, Removed, Stored
from kvatlas.deploy.history.capture import CaptureWriter, read_capture
from kvatlas.deploy.history.filters import Filter, Wanted
from kvatlas.deploy.history.log import Record
from kvatlas.deploy.history.moment import Moment, parse_moment
from kvatlas.deploy.history.summary import CLEARED, REMOVED, STORED, UNREADABLE, read_message

DATA = Path(__file__).parents[2] / "data" / "captures"


def recorded(pod: str) -> list[Record]:
    """The recorded messages of a pod as `kv-events` records."""
    frames = gzip.decompress((DATA / f"{pod}.frames.gz").read_bytes())
    found = []
    for number, (topic, sequence, payload) in enumerate(msgpack.Unpacker(io.BytesIO(frames), raw=True)):
        headers = (
            (topics.H_SEQUENCE, str(int.from_bytes(sequence, "big")).encode()),
            (topics.H_INCARNATION, b"1"),
            (topics.H_ENGINE_TOPIC, topic),
            (topics.H_MODEL, b"demo-model"),
            (topics.H_ENGINE, b"vllm"),
            (topics.H_CONTENT_TYPE, b"engine"),
        )
        found.append(Record(topics.EVENTS, 0, number, 1000 + number, pod.encode(), payload, headers))
    return found


record_strategy = st.builds(
    Record,
    st.sampled_from([topics.EVENTS, topics.PODS]),
    st.integers(0, 100),
    st.integers(0, 2**62),
    st.integers(0, 2**62),
    st.none() | st.binary(max_size=20),
    st.none() | st.binary(max_size=200),
    st.lists(st.tuples(st.text(max_size=8), st.binary(max_size=8)), max_size=4).map(tuple),
)


@settings(deadline=None)
@given(st.lists(record_strategy, max_size=20))
def test_a_capture_gives_back_what_was_saved(tmp_path_factory: pytest.TempPathFactory, found: list[Record]):
    """Whatever the records hold, reading a capture returns them in order."""
    path = tmp_path_factory.mktemp("capture") / "log.kvcap"
    with CaptureWriter(path, created_ns=1) as writer:
        for record in found:
            writer.write(record)
    assert list(read_capture(path)) == found


def test_a_capture_that_is_cut_short_says_after_which_record(tmp_path: Path):
    """What is readable is yielded; the end is an error with the record's number, never silence."""
    path = tmp_path / "log.kvcap"
    with CaptureWriter(path, created_ns=1) as writer:
        for record in recorded("pod-a"):
            writer.write(record)
    path.write_bytes(path.read_bytes()[:-300])
    got = []
    with pytest.raises(WireError, match=r"after record \d+"):
        got.extend(read_capture(path))
    assert got == recorded("pod-a")[: len(got)]


def test_a_failed_capture_leaves_no_file(tmp_path: Path):
    """A capture appears under its name only when it is complete."""
    with pytest.raises(RuntimeError), CaptureWriter(tmp_path / "log.kvcap", created_ns=1):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_any_other_file_is_no_capture(tmp_path: Path):
    """A text file is named, not parsed."""
    (tmp_path / "x").write_text("hello")
    with pytest.raises(WireError, match="not a complete capture"):
        list(read_capture(tmp_path / "x"))


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("earliest", Moment(edge="earliest")),
        ("-15m", Moment(time_ms=1_000_000 - 900_000)),
        ("-1.5s", Moment(time_ms=998_500)),
        ("-99999999999999d", Moment(time_ms=0)),
        ("@1795464237.5", Moment(time_ms=1795464237500)),
        ("2026-11-24T10:00:00Z", Moment(time_ms=1795514400000)),
        ("2026-11-24T11:00:00+01:00", Moment(time_ms=1795514400000)),
        ("offset:12", Moment(offset=12)),
        ("offset:0:5,3:7", Moment(offsets={0: 5, 3: 7})),
        ("seq:9", Moment(sequence=9)),
    ],
)
def test_moments_read_as_written(text: str, moment: Moment):
    """Every documented form of a moment is understood."""
    assert parse_moment(text, now_ms=1_000_000, sequences=True) == moment


@pytest.mark.parametrize(
    "text", ["", "yesterday", "offset:", "offset:x", "offset:1:2:3", "seq:9", "seq:-1", "@soon", "@1e400", "-5y"]
)
def test_a_moment_that_is_none_lists_the_forms(text: str):
    """A bad moment is answered with what can be written."""
    with pytest.raises(SettingsError, match="earliest, latest"):
        parse_moment(text, now_ms=0)


@pytest.mark.parametrize("pod", ["pod-a", "pod-b"])
def test_summaries_agree_with_the_decoder(pod: str):
    """The cheap summary counts the same events, blocks and tokens as full decoding."""
    kinds = {Stored: STORED, Removed: REMOVED, Cleared: CLEARED}
    for record in recorded(pod):
        batch = adapter("vllm")(record.value or b"", Limits())
        line = read_message(record).line()
        assert [event.type for event in line.events] == [kinds[type(event)] for event in batch.events]
        for shown, event in zip(line.events, batch.events, strict=True):
            if isinstance(event, Stored):
                assert (shown.blocks, shown.tokens) == (len(event.keys), len(event.tokens) // 4)
                assert shown.first == event.keys[0].hex()


def test_golden_payloads_of_every_version_have_a_summary():
    """No wire version is unreadable to replay."""
    golden = json.loads((DATA / "golden_payloads.json").read_text())
    for version, cases in golden.items():
        for case, payload in cases.items():
            line = read_message(Record(topics.EVENTS, 0, 0, 0, b"p", bytes.fromhex(payload), ())).line()
            assert line.events, (version, case)
            assert all(event.type != UNREADABLE for event in line.events), (version, case)


def test_garbage_is_shown_as_unreadable_with_its_reason():
    """What cannot be read is shown, not skipped."""
    line = read_message(Record(topics.EVENTS, 0, 0, 0, b"p", b"\xc1garbage", ())).line()
    assert [event.type for event in line.events] == [UNREADABLE]
    assert line.events[0].detail


def test_filters_by_pod_model_type_and_sequence():
    """Each condition alone and together leaves exactly the records that match."""
    log = recorded("pod-a") + recorded("pod-b")

    def kept(**wanted: object) -> list[tuple[str, int]]:
        chosen = Filter(Wanted(**wanted))  # type: ignore[arg-type]
        return [(line.pod, line.sequence) for record in log if (line := chosen.events(record))]

    assert len(kept()) == len(log)
    assert {pod for pod, _ in kept(pods=frozenset({"pod-b"}))} == {"pod-b"}
    assert kept(models=frozenset({"other"})) == []
    cleared = kept(types=frozenset({CLEARED}))
    assert [pod for pod, _ in cleared] == ["pod-a"]


def test_following_a_block_finds_the_messages_that_touch_it():
    """A block key is found by resolving; the messages are those that store or remove it."""
    log = recorded("pod-a")
    first = adapter("vllm")(log[0].value or b"", Limits()).events[0]
    assert isinstance(first, Stored)
    keys = block_key.block_keys(block_key.root_key("demo-model"), first.tokens, 16)
    chosen = Filter(Wanted(keys=frozenset({keys[0]})))
    touched = [line for record in log if (line := chosen.events(record))]
    assert touched[0].sequence == 0
    engine_key = first.keys[0]
    expected = []
    for record in log:
        events = adapter("vllm")(record.value or b"", Limits()).events
        if any(engine_key in event.keys for event in events if not isinstance(event, Cleared)):
            expected.append(record.offset)
    assert [line.offset for line in touched] == expected
