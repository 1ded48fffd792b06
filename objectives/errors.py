"""The exceptions whose text is written for the person at the terminal.

DsTuneError
├── UsageError          what was asked cannot be done; exit code 2
└── EnvironmentFault    the machine or its software cannot do it; exit code 1
"""


class DsTuneError(Exception):
    """Base of the errors that the command line shows as one sentence, without a traceback."""


class UsageError(DsTuneError, ValueError):
    """A user's input that cannot be used; the text says what is wrong and what to do about it."""


class EnvironmentFault(DsTuneError, RuntimeError):
    """The machine cannot run what was asked; the text says why and what to install or change."""
