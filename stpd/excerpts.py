"""What a reader may not see of a batch that it may see in part (protocol §10.2, R-10-11).

A publisher's batch is never cut between keepers, and a filter lets it through whole. Where the access rules of a
reader do not reach as far as the batch does, the reader gets an excerpt.
"""

from __future__ import annotations

from collections.abc import Sequence

from stp.batch import excerpt, open_batch, read_batch_head
from stp.core.errors import UsageError
from stp.records import PART, RecordHead, batches_of, encode_record
from stp.topics import Decision, FilterSet


def hide(record: bytes, head: RecordHead, keep: Sequence[int], reads: FilterSet) -> bytes | None:
    """A part of the record with what *reads* lets through of the batches at the places *keep* (R-10-30).

    None: nothing needs hiding. b"": nothing is left.
    """
    batches = batches_of(record, head)
    shown = [_shown(batches[place], reads) for place in keep]
    if all(shown[at] is batches[place] for at, place in enumerate(keep)):
        return None
    left = [batch for batch in shown if batch]
    if not left:
        return b""
    return encode_record(
        head.lane, head.source, head.number, left, kind=PART, hops=head.hops, age_ds=head.age_ds
    )


def _shown(batch: bytes, reads: FilterSet) -> bytes:
    """The batch itself, an excerpt, or b"" where nothing of it may be seen. Opened where the prefix is no help."""
    decision = reads.decide(read_batch_head(batch).prefix)
    if decision is Decision.ALL:
        return batch
    topics = open_batch(batch).topics if decision is Decision.OPEN else []
    seen = [place for place, topic in enumerate(topics) if reads.matches(topic)]
    if seen and len(seen) == len(topics):
        return batch
    try:
        return excerpt(batch, seen) if seen else b""
    except UsageError:  # it opens to more than a record holds: better nothing than too much
        return b""
