"""Define the exceptions whose message is one sentence for the user, and the exit codes of a process.

`train/entry.py` prints the sentence and ends the process with the code.
"""

import errno

EXIT_CONFIGURATION = 2  # a setting or a file of the user must change first
EXIT_STOPPED = 3  # the run stopped itself: the same command would stop again
EXIT_HUNG = 4  # a rank made no progress or was lost; the run resumes from its last checkpoint
EXIT_INTERRUPTED = 75  # sysexits.h EX_TEMPFAIL: a signal, or failing storage; the same command continues the run

# Errors of a disk, a file server or the network between: often temporary, and never a defect of the data.
STORAGE_NAMES = (
    *("EIO", "EREMOTEIO", "EBADMSG", "EUCLEAN", "ENODATA", "ENODEV"),  # the disk
    *("ESTALE", "ETIMEDOUT", "ENOLINK", "ECOMM", "EPROTO", "ENOTCONN", "ESHUTDOWN"),  # the server
    *("ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "ENETDOWN", "ENETUNREACH", "ENETRESET"),  # the network
    *("EHOSTDOWN", "EHOSTUNREACH"),
    *("EAGAIN", "EBUSY", "ENOLCK", "ENOBUFS", "ENOMEM", "EMFILE", "ENFILE"),  # this machine, short of something
)
STORAGE_ERRNOS = frozenset(getattr(errno, name) for name in STORAGE_NAMES if hasattr(errno, name))  # Linux defines all


class ConfigurationError(ValueError):
    """A setting cannot work; the message is one sentence with the change to make (exit code 2)."""


class ReadingStopped(RuntimeError):
    """Reading of data ended on one rank; the next reduction raises it on all ranks (`train/step/reduction.py`).

    `alone`: only this rank raises it, so that it prints the message itself.
    """

    alone = False


class StorageFailed(ReadingStopped):
    """A disk or file system kept failing after all retries; the message holds the path and the cause.

    The data may be good, so the job is queued again (exit code 75).
    """

    alone = True


class PeersMissing(RuntimeError):
    """The other processes of a run did not connect; the message names the rendezvous (exit code 4)."""


class RunStopped(RuntimeError):
    """The run cannot continue by itself, though its configuration is valid (exit code 3).

    `alone`: only this rank raises it, so that it prints the message itself.
    """

    def __init__(self, message: str, alone: bool = False) -> None:
        super().__init__(message)
        self.alone = alone


class Interrupted(Exception):
    """All ranks agreed to stop after a signal, and the run is saved (exit code 75)."""


class PeerLost(RuntimeError):
    """The connection to another rank broke; the message names the rank where that is known (exit code 4)."""


class Notice(UserWarning):
    """Warn the user of something that does not stop the program; the message is one sentence."""
