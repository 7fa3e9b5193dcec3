"""The one exception that stands for a mistake of the user, not of the program."""


class ConfigurationError(ValueError):
    """A setting that cannot work: the message is one sentence that says what to change (entry points exit with 2)."""


class Notice(UserWarning):
    """What a user should know and the program can live with; the message is one sentence."""
