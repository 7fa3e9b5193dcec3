"""Make standard output and error accept file names and texts in any language."""

import io
import sys


def use_utf8() -> None:
    """Make standard output and error accept every character, whatever the locale.

    A terminal keeps the encoding of its locale and shows other characters as escapes; files and pipes get UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test or a notebook may have replaced it
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="backslashreplace")
