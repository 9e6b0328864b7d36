"""The errors that sparring raises on purpose. Anything else is a bug."""


class UserError(Exception):
    """The user's input cannot be used. The message says what is wrong, where, and what to do. Exit code 2."""


class RunMismatch(UserError):
    """The run directory was started with other settings, or from other files."""


class RunError(Exception):
    """The run stopped to protect its results: nothing committed is lost. Exit code 1."""


class Interrupted(RunError):
    """The user or the scheduler asked to stop. Exit code 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__("Interrupted. Everything up to here is committed, and the same command continues.")
        self.number = number


class NothingToTrainOn(RunError):
    """None of the opponent's responses is one that the method trains on."""


class RankLost(RunError):
    """Another rank of the stage died or does not answer."""


class OutOfMemory(RunError):
    """A rank ran out of memory. It left a smaller micro-batch size, and the stage restarts from its last checkpoint."""


class CorruptedError(RunError):
    """Bytes on disk differ from those that were written. `play` runs again the stage that wrote them."""
