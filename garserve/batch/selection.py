"""What of an input is still to be answered: its records, filtered, each id once, brought together by image."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from garserve.batch.bundles import Bundle, gather
from garserve.batch.filters import Filters
from garserve.batch.ledger import Ledger
from garserve.batch.record import Record, request_digest
from garserve.batch.source import Source
from garserve.batch.sources import each_region
from garserve.errors import RequestError


@dataclass(frozen=True)
class Selection:
    """Which bundles of a source a job asks; the same ones in the same order whenever source and ledger are the same.

    `split_regions` describes every region by itself. With `mix`, an id that was answered for another request counts
    as answered.
    """

    source: Source
    filters: Filters
    group: int = 1
    split_regions: bool = False
    mix: bool = False
    folders: tuple[Path, ...] = ()  # where images lie, as the filters' shard wants to know

    @property
    def total(self) -> int | None:
        """Records that pass the filters, where known."""
        return None if self.split_regions else self.filters.expected(self.source.total)

    def bundles(
        self,
        ledger: Ledger,
        on_answered: Callable[[int], None] = lambda _: None,
        on_unmet: Callable[[frozenset[str]], None] = lambda _: None,
    ) -> Iterator[Bundle]:
        """Yield what is not answered yet.

        `on_answered` is told how many records are, whenever it comes to some; `on_unmet`, at the end of an input that
        no limit cut short, which of the ids that the filters ask for it does not have.
        RequestError where the input has no request at all, no category or none of the ids that are asked for, or
        another request under an answered id.
        """
        records = _found(self.source, self.filters)
        if self.split_regions:
            records = each_region(records)
        known = _meeting(_once(records, ledger), self.filters.ids, self.source.path, on_unmet)
        chosen = self.filters.of(known, self.folders)
        checked = chosen if self.mix else _unchanged(chosen, ledger)
        for of_image in gather(checked, group=self.group):
            wanted = tuple(ledger.digest(record.key) is None for record in of_image)
            if not all(wanted):
                on_answered(wanted.count(False))
            if not any(wanted):
                continue
            if self.group == 1:
                of_image = tuple(record for record, flag in zip(of_image, wanted, strict=True) if flag)
                wanted = (True,) * len(of_image)
            yield Bundle(of_image, wanted)


def _found(source: Source, filters: Filters) -> Iterator[Record]:
    """Yield a source's records; RequestError where it has none, or no category that the filters ask for."""
    count = 0
    try:
        for count, record in enumerate(source.records(), start=1):
            if count == 1 and (known := getattr(source, "categories", None)) is not None:
                filters.check_categories(known, source.path)
            yield record
    except OSError as error:
        raise RequestError(f"input {source.path}: cannot be read ({error.strerror or error})") from None
    if count == 0:
        raise RequestError(f"input {source.path}: expected a request, found none; is it of another --format?")


def _meeting(
    records: Iterator[Record], ids: frozenset[str], path: Path, on_unmet: Callable[[frozenset[str]], None]
) -> Iterator[Record]:
    """Pass records on; at their end, tell which ids were not among them, or raise RequestError where none was."""
    unmet = set(ids)
    for record in records:
        unmet.discard(str(record.key))
        yield record
    if ids and len(unmet) == len(ids):
        raise RequestError(f"--ids: none of the {len(ids)} ids came up in {path}, such as {min(unmet)!r:.80}")
    on_unmet(frozenset(unmet))


def _unchanged(records: Iterator[Record], ledger: Ledger) -> Iterator[Record]:
    """Pass records on; RequestError at one whose id was answered for another request."""
    for record in records:
        known = ledger.digest(record.key)
        if known and known != request_digest(record):
            raise RequestError(
                f"{record.place}: id {record.key!r:.80} was answered before for another image, other regions or "
                "another question: the input has changed; choose another output, or --mix to keep what was answered"
            )
        yield record


def _once(records: Iterator[Record], ledger: Ledger) -> Iterator[Record]:
    """Turn a record whose id came up before into an error that is named by its place."""
    numbers: dict[str, int] = {}  # of a place that is not the only one of its name: the next that may be free
    for record in records:
        if ledger.first_time(record.key):
            yield record
            continue
        again = numbers.get(record.place, 1)
        place = record.place if again == 1 else f"{record.place} again {again}"
        while not ledger.first_time(replace(record, id=None, place=place).key):
            again += 1
            place = f"{record.place} again {again}"
        if again > 1:
            numbers[record.place] = again + 1
        yield replace(record, id=None, place=place, error=f"id: {record.key!r:.80} came up before in this input")
