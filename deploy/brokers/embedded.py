"""The embedded broker: librdkafka's mock cluster, in this process, in RAM, for demonstrations only.

It needs no Java and starts in milliseconds. It is no log: it forgets, and a restore from it restores nothing.

What was tried with aiokafka 0.14 and confluent-kafka 2.16 (librdkafka 2.16), and what follows:

=========================================  ===========================================================================
produce, fetch, headers, keys, timestamps  as on a real broker (the produce reply's timestamp is a constant)
gzip, snappy, lz4, zstd                    all work
idempotent producer                        works
50 MB messages                             taken, then forgotten at once: see the next line
retention                                  the newest 5 MB of a partition, by size alone; a slower consumer's position
                                           falls out of range and its `auto_offset_reset` applies
one message above 2.5 MB                   may be gone before it is read
compaction                                 none: a compacted topic is a 5 MB topic
topics                                     appear on first use, always with 4 partitions; CreateTopics, DeleteTopics,
                                           CreatePartitions, Describe/AlterConfigs, DeleteRecords are not known
transactions                               do not use: records written in one cannot be read (CRC error)
consumer group, one member                 works; a join takes 3 s, a rejoin 5 s (a fixed rebalance delay)
consumer group, two members                the second one fails (SyncGroup: INVALID_REQUEST): one worker only
offset commit and fetch                    work, also across members that come one after another
offsets for a time                         never found (None)
beginning and end offsets                  right
fetch over several partitions              answers when `fetch_max_wait_ms` is over, not when a record comes (0.47 s
                                           measured at the default of 500, 0.02 s at 50): set 50 or less
=========================================  ===========================================================================

Faust needs `topic_allow_declare=False`. The brokers listen on random ports of the loopback.
"""

from __future__ import annotations

from typing import Any, Final, Self

from kvatlas.deploy.brokers.errors import BrokerSetupError, BrokerStartError, BrokerStateError

PARTITIONS: Final = 4
"""Partitions of every topic; fixed in librdkafka."""

RETAINED_BYTES_PER_PARTITION: Final = 5 * 1024 * 1024
"""What a partition keeps; fixed in librdkafka."""

_METADATA_TIMEOUT_SECONDS = 10.0


class EmbeddedBroker:
    """A mock cluster that lives as long as this object is started.

    The broker's threads are librdkafka's: they need neither an event loop nor Python's interpreter lock.
    """

    def __init__(self) -> None:
        self._producer: Any = None
        self._bootstrap = ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def bootstrap(self) -> str:
        """Address for clients, `host:port`.

        Raises:
            BrokerStateError: it is not started.
        """
        if self._producer is None:
            raise BrokerStateError("the embedded broker is not running; call start()")
        return self._bootstrap

    def start(self) -> None:
        """Start it.

        Raises:
            BrokerSetupError: confluent-kafka is not installed.
            BrokerStartError: librdkafka did not say where it listens.
            BrokerStateError: it is started already.
        """
        if self._producer is not None:
            raise BrokerStateError("the embedded broker runs already")
        try:
            from confluent_kafka import KafkaException, Producer  # noqa: PLC0415 - an optional dependency
        except ImportError as error:
            raise BrokerSetupError(
                "the embedded broker needs confluent-kafka: pip install 'kvatlas[embedded]', or give --brokers"
            ) from error
        # The mock cluster belongs to a client; log_level 0 hides the notice that the client's own servers are ignored.
        producer = Producer({"bootstrap.servers": "", "test.mock.num.brokers": 1, "log_level": 0})
        try:
            brokers = producer.list_topics(timeout=_METADATA_TIMEOUT_SECONDS).brokers.values()
        except KafkaException as error:
            raise BrokerStartError(f"the embedded broker did not answer: {error}") from error
        self._producer = producer
        self._bootstrap = ",".join(f"{broker.host}:{broker.port}" for broker in brokers)

    def stop(self) -> None:
        """Stop it and forget everything; without effect when it is not running."""
        # librdkafka ends the mock cluster with the last reference to its client.
        self._producer = None
