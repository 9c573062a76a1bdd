"""Tests of what a worker knows of the others."""

from __future__ import annotations

from kvatlas.bridge.model.records import WorkerRecord, encode
from kvatlas.bridge.model.workers import WorkerDirectory

NOW = 1_000


def book_of(*records: WorkerRecord) -> WorkerDirectory:
    book = WorkerDirectory(lambda: NOW)
    for record in records:
        book.apply(record.worker.encode(), encode(record))
    return book


def claim(worker: str, generation: int, updated_ns: int, expires_ns: int = NOW + 1) -> WorkerRecord:
    return WorkerRecord(
        worker=worker,
        endpoint=f"{worker}:1",
        partitions=[0],
        partition_count=1,
        generation=generation,
        updated_ns=updated_ns,
        expires_ns=expires_ns,
    )


def test_the_latest_assignment_names_the_owner() -> None:
    """A worker that stood still and goes on may announce what was true before: a later assignment counts more."""
    assert book_of(claim("new", 7, 500), claim("frozen", 6, 900)).owner(0, besides="me") == "new:1"
    assert book_of(claim("new", 7, 500), claim("again", 7, 900)).owner(0, besides="me") == "again:1"


def test_what_ran_out_or_is_our_own_names_nobody() -> None:
    """Announcements hold for a while; this worker never names itself, and a tombstone ends a claim."""
    book = book_of(claim("dead", 9, 900, expires_ns=NOW), claim("me", 9, 900), claim("other", 1, 1))
    assert book.owner(0, besides="me") == "other:1"
    book.apply(b"other", None)
    assert book.owner(0, besides="me") == ""
    assert book.owner(1, besides="me") == ""


def test_stale_is_an_index_that_nobody_says_he_keeps() -> None:
    """One valid announcement is enough; before the first there is nothing to be stale."""
    assert not book_of().stale
    assert book_of(claim("away", 7, 500, expires_ns=NOW), claim("killed", 6, 900, expires_ns=NOW)).stale
    assert not book_of(claim("away", 7, 500, expires_ns=NOW), claim("kept", 6, 900)).stale
    left = book_of(claim("left", 7, 500))
    left.apply(b"left", None)
    assert left.stale


def test_redirects_and_routes_name_the_same_owner() -> None:
    """Whoever a worker sends a scorer to is whom the scorer asks first; one that restores only where nobody has it."""
    restoring = WorkerRecord(
        worker="next", endpoint="next:1", restoring=[0, 1], partition_count=2, generation=9, expires_ns=NOW + 1
    )
    book = book_of(claim("new", 7, 500), claim("frozen", 6, 900), restoring)
    assert book.route(0).owners[0] == book.owner(0) == "new:1"
    assert (book.route(1).owners, book.owner(1)) == ((), "next:1")
