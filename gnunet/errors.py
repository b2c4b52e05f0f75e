"""Errors whose text is meant for the user.

Command-line programs print them without a traceback and exit with status 2; everything else is a bug and
keeps its traceback.
"""


class GnunetError(Exception):
    """Base of every error that the user can mend; the message says what was given and what is valid."""


class ConfigError(GnunetError):
    """A key, a value or a combination of values in the configuration is not valid."""


class DataError(GnunetError):
    """A data source cannot be found, opened or decoded."""


class CheckpointError(GnunetError):
    """A run folder or a checkpoint is torn, foreign, or belongs to another configuration."""


class TrainingError(GnunetError):
    """Training cannot go on, for instance because the loss stayed non-finite."""
