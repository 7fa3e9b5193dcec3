"""Skip a record that cannot be used, with the cause that is counted."""

from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import ReadingStopped


class Skip(Exception):
    """Report a record that an objective cannot use. A `defect` (broken data, not another kind of record) costs budget.

    `cause` is counted, so there are few different ones; `detail` is logged, and may show a value of the record.
    """

    def __init__(self, cause: str, defect: bool = False, detail: str = ""):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause
        self.defect = defect
        self.detail = detail


@contextmanager
def one_record(use: str) -> Iterator[None]:
    """Turn any exception of one record, while it is read and used, into a Skip, a defect of this record.

    A list of exceptions would miss one, and a restart would end at the same record. Skip and ReadingStopped pass.
    """
    try:
        yield
    except (Skip, ReadingStopped):
        raise
    except Exception as error:
        raise Skip(f"{type(error).__name__} in {use}", defect=True, detail=str(error)[:200]) from error
