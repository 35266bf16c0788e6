"""How many rows a round of B requests has: batch sizes with a graph of their own, and the branches of each."""

from __future__ import annotations

from dataclasses import dataclass

MAX_ROWS = 256
"""Rows of one forward, over all requests: with more requests each gets fewer branches, so that a step stays short."""

BRANCHES_A_POSITION = 4
"""N where it is left to us, for each of the K + 1 places where the drafts under verification may end."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A batch of `batch` requests (fewer are padded), each with `branches` branches."""

    batch: int
    branches: int

    @property
    def rows(self) -> int:
        """Rows of a branch step."""
        return self.batch * self.branches


def default_branches(num_speculative_tokens: int) -> int:
    """N where it is left to us: 4 (K + 1), with K = 4 it is 20. More rows cost little where a forward is bound by its
    weights, and hit seldom.
    """
    return BRANCHES_A_POSITION * (num_speculative_tokens + 1)


def branches_for(batch: int, branches: int, max_rows: int = MAX_ROWS) -> int:
    """N of each request in a batch: `branches`, or as many as MAX_ROWS leave; at least one."""
    return max(1, min(branches, max_rows // batch))


def buckets(slots: int, branches: int, max_rows: int = MAX_ROWS) -> list[Bucket]:
    """Batches of 1, 2, 4, ... requests and of all `slots`, smallest first."""
    sizes = {slots} | {2**i for i in range(slots.bit_length()) if 2**i < slots}
    return [Bucket(size, branches_for(size, branches, max_rows)) for size in sorted(sizes)]


def most_rows_first(found: list[Bucket]) -> list[Bucket]:
    """The order to warm up and to capture in: scratch that grows with the rows would move under a graph that has it.

    The largest batch need not be the first: 20 requests with 12 branches have fewer rows than 16 with 16.
    """
    return sorted(found, key=lambda bucket: (bucket.rows, bucket.batch), reverse=True)


def bucket_of(found: list[Bucket], batch: int) -> Bucket:
    """The smallest of the buckets that holds `batch` requests. StopIteration where none does."""
    return next(bucket for bucket in found if bucket.batch >= batch)
