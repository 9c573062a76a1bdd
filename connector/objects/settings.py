"""Settings of the object tier: where the blocks are, and how hard requests are tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from kvatlas.bridge.errors import SettingsError

SCHEME = "s3://"


@dataclass(frozen=True, kw_only=True)
class ObjectTierSettings:
    """Settings of the object tier.

    Attributes:
        url: ``s3://bucket`` or ``s3://bucket/prefix``; engines and evictors may share it.
        store: options of the client as obstore's ``S3Store`` names them, for example ``endpoint``, ``region``; what is
            not named comes from the ``AWS_*`` environment variables. Credentials belong there, or to the machine.
        threads: requests in flight at once; each holds a block in memory.
        write_threads: how many of them may be stores; 0 means half, at least one.
        queued_write_bytes: stores waiting beyond this are shed.
        part_bytes: blocks above this are stored as multipart uploads with parts of this size (5 MiB to 5 GiB).
        range_bytes: blocks above this are loaded as several ranges of this size at once.
        request_seconds: limit of one request, body included.
        connect_seconds: limit of making a connection.
        retries, retry_seconds: how often, and for how long in all, a request that failed on the way is tried again.
        pause_failures, pause_seconds: after so many failures in a row nothing is asked of the store for so long;
            lookups say no and stores are shed meanwhile, so that a store that is away costs an engine nothing.
        absent_seconds: how long a lookup's "no" is believed, so that storing the block next asks no second time.
        distrust_seconds: how long a block that could not be read is reported absent.
        usage_seconds: how often uses are written for the evictor, while there are any.
    """

    url: str
    store: Mapping[str, str] = field(default_factory=dict)
    threads: int = 16
    write_threads: int = 0
    queued_write_bytes: int = 1 << 30
    part_bytes: int = 32 << 20
    range_bytes: int = 32 << 20
    request_seconds: float = 30.0
    connect_seconds: float = 5.0
    retries: int = 3
    retry_seconds: float = 10.0
    pause_failures: int = 5
    pause_seconds: float = 10.0
    absent_seconds: float = 5.0
    distrust_seconds: float = 30.0
    usage_seconds: float = 60.0

    def __post_init__(self) -> None:
        split_url(self.url)
        if self.threads < 1 or not 0 <= self.write_threads <= self.threads:
            raise SettingsError(
                f"threads {self.threads}, write_threads {self.write_threads}: need 0 <= writes <= threads"
            )
        if not 5 << 20 <= self.part_bytes <= 5 << 30:
            raise SettingsError(f"part_bytes {self.part_bytes}: S3 takes parts of 5 MiB to 5 GiB")
        if self.range_bytes < 1 << 20:
            raise SettingsError(f"range_bytes {self.range_bytes}: at least 1 MiB")


def split_url(url: str) -> tuple[str, str]:
    """Return bucket and prefix of an ``s3://`` address.

    Raises:
        SettingsError: it is not one.
    """
    parts = urlsplit(url)
    if not url.startswith(SCHEME) or not parts.netloc or parts.query or parts.fragment or "@" in parts.netloc:
        raise SettingsError(
            f"{url!r} is no object store; write s3://bucket/prefix, credentials go into the environment"
        )
    return parts.netloc, parts.path.strip("/")
