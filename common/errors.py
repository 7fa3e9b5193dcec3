"""Exceptions whose message is one sentence for the user; `train/entry.py` gives each its exit code."""

import errno

# Errors of a disk, a file server or the network between: they often pass, and say nothing about the data.
STORAGE_NAMES = (
    *("EIO", "EREMOTEIO", "EBADMSG", "EUCLEAN", "ENODATA", "ENODEV"),  # the disk
    *("ESTALE", "ETIMEDOUT", "ENOLINK", "ECOMM", "EPROTO", "ENOTCONN", "ESHUTDOWN"),  # the server
    *("ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "ENETDOWN", "ENETUNREACH", "ENETRESET"),  # the network
    *("EHOSTDOWN", "EHOSTUNREACH"),
    *("EAGAIN", "EBUSY", "ENOLCK", "ENOBUFS", "ENOMEM", "EMFILE", "ENFILE"),  # this machine, short of something
)
OF_STORAGE = frozenset(getattr(errno, name) for name in STORAGE_NAMES if hasattr(errno, name))  # Linux has all of them


class ConfigurationError(ValueError):
    """A setting that cannot work: the message is one sentence that says what to change (entry points exit with 2)."""


class ReadingStopped(RuntimeError):
    """Data cannot be read on: what one rank raises of this kind, all ranks raise (`train/step/reduction.py`).

    `alone`: only this rank raises it, so that it prints the message itself.
    """

    alone = False


class StorageFailed(ReadingStopped):
    """A disk or file system kept failing after all retries; the message holds the path and the cause.

    The data may be good, so the job is queued again (exit code 75).
    """

    alone = True


class PeersMissing(RuntimeError):
    """The other processes of a run did not come; the message names where this one waited (exit code 4)."""


class Notice(UserWarning):
    """What a user should know and the program can live with; the message is one sentence."""
