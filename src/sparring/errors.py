"""What can go wrong by intent. Anything else that is raised is a bug of ours."""


class UserError(Exception):
    """The user's input cannot be used. The message says what, where, and how to mend it. Exit code 2."""


class RunMismatch(UserError):
    """The run directory was started with other settings, or from other files."""


class RunError(Exception):
    """The run stopped to protect what it has: nothing that was committed is lost. Exit code 1."""


class Interrupted(RunError):
    """The user, or who runs the machine, asked to stop. Exit code 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted; everything up to here is kept, and the same command continues")
        self.number = number


class RankLost(RunError):
    """Another rank of the stage has died, or does not answer."""


class OutOfMemory(RunError):
    """Memory ran out on a rank; what it allows is noted, and the stage begins anew from its last checkpoint."""


class CorruptedError(RunError):
    """Bytes on disk are not those that were written. `play` makes again what can be made again."""
