"""Records that do not join, such as annotations without an image, or are empty: counted, and the first ones named."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from mmx.data.json_fields import RecordLocation

MAX_NAMED = 3
ReportSkipped = Callable[[str], object]


class SkippedRecords:
    """Collects the records that a reader cannot use, or not fully, by file and reason."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, str], list[str]] = {}

    def add(self, location: RecordLocation, reason: str, effect: str = "skipped") -> None:
        """Add a record. reason: a clause such as "the caption is empty"; effect: what becomes of the record."""
        names = self._records.setdefault((location.path, f"{effect}, because {reason}"), [])
        names.append(location.record or str(location))

    def sentences(self) -> list[str]:
        """Return one sentence for each file and reason, with the number of records and the first of them."""
        sentences = []
        for (path, reason), names in self._records.items():
            count = "1 record" if len(names) == 1 else f"{len(names):,} records"
            more = ", ..." if len(names) > MAX_NAMED else ""
            sentences.append(f"{path}: {count} {reason}: {', '.join(names[:MAX_NAMED])}{more}")
        return sentences


def warn_skipped(message: str) -> None:
    """Report skipped records as a Python warning."""
    warnings.warn(message, stacklevel=3)
