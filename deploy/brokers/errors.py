"""Errors of the broker launchers.

The tree::

    kvatlas.bridge.errors.KvatlasError
    └── BrokerError
        ├── BrokerSetupError      Java, Maven or the jars are missing: install, then try again
        ├── BrokerStartError      the process ended or did not answer in time; carries the log's end
        ├── BrokerStateError      asked for something the node's state does not allow (started twice, not running)
        ├── BrokerUnavailableError  a broker that should be there does not answer (retriable)
        └── TopicMismatchError    a topic exists with other partitions than the table asks for
            └── TopicPolicyError  ... with another cleanup policy
"""

from __future__ import annotations

from kvatlas.bridge.errors import KvatlasError


class BrokerError(KvatlasError):
    """Anything that went wrong around a broker; the message says what to do next."""


class BrokerSetupError(BrokerError):
    """The machine lacks what a real Kafka needs."""


class BrokerStartError(BrokerError):
    """The broker process did not come up."""


class BrokerStateError(BrokerError):
    """The node is not in the state that the call needs."""


class BrokerUnavailableError(BrokerError):
    """No broker answers at the bootstrap address."""

    retriable = True


class TopicMismatchError(BrokerError):
    """An existing topic differs from the topic table in what cannot be changed in place."""


class TopicPolicyError(TopicMismatchError):
    """An existing topic is cleaned otherwise than the topic table asks for."""
