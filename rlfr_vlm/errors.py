"""Errors whose message is meant for the user; the command line turns each into one line and an exit
code.
"""


class UserError(Exception):
    """Bad configuration, data, model or lock: names the field, row or file and what to do. Exit
    code 2.
    """

    exit_code = 2


class CheckpointError(UserError):
    """No checkpoint can be trusted: names the file and what was expected of it. Exit code 4."""

    exit_code = 4


class DiskFullError(UserError):
    """The disk is full: names the path and how much is missing. Exit code 5."""

    exit_code = 5


class StoppedError(UserError):
    """A check stopped the run (weight sync, monitor): says what, where and what to do. Exit code
    3.
    """

    exit_code = 3


class NonFiniteError(StoppedError):
    """A log-prob, reward, advantage, deviation, loss or gradient is not a finite number, and no
    weight has seen it. Exit code 3.
    """


class NonFiniteWeightError(NonFiniteError):
    """A weight, or a moment of an optimiser, is not a finite number, and no engine and no
    checkpoint has seen it. Exit code 3.
    """


class RolledBack(StoppedError):
    """A monitor took the run back to an older checkpoint: the same command goes on from there. Exit
    code 3.
    """


class Preempted(Exception):
    """The run was asked to stop (SIGTERM) and has saved a checkpoint. Exit code 75."""

    exit_code = 75
