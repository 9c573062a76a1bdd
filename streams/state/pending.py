"""What was applied to a partition and is not committed yet.

Applying and committing take turns of their own: while one cut of changes is on its way to the changelog, the next one
gathers. Whoever answers from the table sees both at once: the changes come from source records that Kafka has, so they
are true whether or not this worker lives to commit them, and the next owner comes to the same from the same records.
"""

from __future__ import annotations

from typing import NamedTuple

from kvatlas.streams.faust_app.table import BulkTable, PartitionView
from kvatlas.streams.state.partition import Ahead


class Cut(NamedTuple):
    """Changes that are to be committed together.

    Attributes:
        view: what changed.
        source_offset: last source record that it reflects.
        receive_ns: newest receive time in it, bridge clock.
    """

    view: PartitionView
    source_offset: int
    receive_ns: int


class Pending:
    """The changes of one partition that wait for a commit; one writer at a time applies, cuts and commits.

    Args:
        table: the table.
        partition: its partition.
        most_records: source records after which no more should be applied before a commit.
        most_updates: the same in updates.

    Attributes:
        view: to apply to.
    """

    def __init__(self, table: BulkTable, partition: int, *, most_records: int, most_updates: int) -> None:
        self._table = table
        self._partition = partition
        self._state = table.store.local(partition)
        self._most_records = most_records
        self._most_updates = most_updates
        self._records = self._updates = 0
        self._source_offset, self._receive_ns = -1, 0
        self._committing: Cut | None = None
        self.view = table.view(partition)

    @property
    def full(self) -> bool:
        """Return whether it is time to commit, however short the last one is ago."""
        return self._records >= self._most_records or self._updates >= self._most_updates

    def advance(self, source_offset: int, receive_ns: int, *, records: int, updates: int) -> None:
        """Take note of what the view reflects now; whoever answers from the table sees it from here on.

        Args:
            source_offset: last source record applied.
            receive_ns: newest receive time among the records applied, bridge clock.
            records: source records applied.
            updates: updates that they brought.
        """
        self._source_offset = source_offset
        self._receive_ns = max(self._receive_ns, receive_ns)
        self._records += records
        self._updates += updates
        self._show()

    def cut(self) -> Cut:
        """Return what was applied since the last cut; what is applied from now on goes on top of it."""
        cut = self._committing = Cut(self.view, self._source_offset, self._receive_ns)
        self.view = self._table.view(self._partition, above=cut.view)
        self._records = self._updates = 0
        self._show()
        return cut

    async def commit(self, cut: Cut) -> None:
        """Commit the last cut; after a failure it can be committed again.

        Raises:
            ChangelogError: the changelog was not acknowledged.
            FencedError: another worker owns the partition now.
        """
        await self._table.commit(self._partition, cut.view, cut.source_offset, cut.receive_ns)
        self._committing = None
        self._show()

    def drop(self) -> None:
        """Forget what is not committed: it is applied again by whoever owns the partition next."""
        self.view = PartitionView(self._state)  # the table would open a partition again that went elsewhere meanwhile
        self._committing = None
        self._records = self._updates = 0
        self._source_offset = -1
        self._state.ahead = None

    def _show(self) -> None:
        layers = [self.view.writes] if self._records else []
        if self._committing is not None:
            layers.append(self._committing.view.writes)
        self._state.ahead = Ahead(tuple(layers), self._source_offset, self._receive_ns) if layers else None
