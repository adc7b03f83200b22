"""What labkit raises when it is given something it cannot work with.

Every message is one line: what was wrong, and what to do about it. Both classes are `ValueError`s, so code that
knows nothing of labkit catches them too; anything else that escapes from labkit is a bug of labkit.
"""


class LabkitError(ValueError):
    """An input that cannot work; the message is one line that says what was wrong and what to do."""


class CheckpointError(LabkitError):
    """Weights that are missing, damaged or of another architecture; the message names the file and the key."""
