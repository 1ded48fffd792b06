"""Optimizer steps of a script that are like the others: only those are timed."""

FEWEST_BETWEEN = 2
"""A step in which the data began again counts where it comes oftener than after so many that do: it is the rule
then. Beginning again takes seconds where workers are started: 2.8 to 4.4 s were seen, beside steps of 0.3 s."""


class WholeSteps:
    """Judge of one rank's steps, by what they were fed."""

    def __init__(self, samples: int) -> None:
        """
        Args:
            samples: rows that a rank is fed in a whole step.
        """
        self._samples = samples
        self._rows = 0
        self._began_again = False
        self._since = 0
        """Steps that count since the data began."""

    def fed(self, rows: int) -> None:
        """A micro-batch of the present step has so many rows."""
        self._rows += rows

    def data_began_again(self) -> None:
        """The data came to its end within the present step."""
        self._began_again = True

    def step_done(self) -> bool:
        """Whether the step that has ended has all of its samples, and did not wait for data to begin again."""
        is_rare = self._began_again and self._since >= FEWEST_BETWEEN
        is_whole = self._rows >= self._samples and not is_rare
        self._since = is_whole + (0 if self._began_again else self._since)
        self._rows, self._began_again = 0, False
        return is_whole
