"""Kafka's refusals of rights, found in errors and said with their remedy."""

from __future__ import annotations

from aiokafka.errors import GroupAuthorizationFailedError, KafkaError, TopicAuthorizationFailedError

from kvatlas.bridge.errors import RightsError, causes
from kvatlas.bridge.runtime.settings import KafkaSettings


def lost_right(error: BaseException | None, settings: KafkaSettings) -> RightsError | None:
    """Return what an error says of missing rights, looking through its causes; None where it says nothing of them."""
    refusal = refusal_in(error)
    if refusal is None:
        return None
    kind = "group" if isinstance(refusal, GroupAuthorizationFailedError) else "topic"
    names = ", ".join(sorted(_names(refusal)))
    return RightsError(
        f"Kafka at {settings.brokers} refuses {kind} {names or '(it does not say which)'} to "
        f"{settings.sasl_username or 'this account'}: give back the rights that docs/security.md lists "
        "(`kvatlas topics --acls` prints the commands)"
    )


def refusal_in(error: BaseException | None) -> KafkaError | None:
    """Return Kafka's refusal of a topic or group to the account among an error and its causes."""
    for found in causes(error):
        if isinstance(found, TopicAuthorizationFailedError | GroupAuthorizationFailedError):
            return found
        # Asked for committed offsets, aiokafka knows no reason but the few it names, and puts the others into text.
        for kind in (TopicAuthorizationFailedError, GroupAuthorizationFailedError):
            if type(found) is KafkaError and found.args and str(found.args[0]).startswith(kind.__name__):
                return kind()
    return None


def _names(error: KafkaError) -> list[str]:
    found: list[str] = []
    for argument in error.args:
        found += [argument] if isinstance(argument, str) else map(str, argument or ())
    return found
