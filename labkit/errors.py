"""What labkit raises when it is given something it cannot work with.

Every message is one line: what was wrong, and what to do about it. Both classes are `ValueError`s, so code that
knows nothing of labkit catches them too; anything else that escapes from labkit is a bug of labkit.
"""

LONGEST = 1200  # characters of a message about files, which quotes what strangers wrote into them


class LabkitError(ValueError):
    """An input that cannot work; the message is one line that says what was wrong and what to do."""


class CheckpointError(LabkitError):
    """Weights that are missing, damaged or of another architecture; the message names the file and the key.

    Names come out of the files, so whatever would break the line or command a terminal is spelled out (`\\n`, `\\x1b`), and a
    message that is very long loses its middle.
    """

    def __init__(self, message: str) -> None:
        if len(message) > LONGEST:
            message = f"{message[: LONGEST - 405]} ... {message[-400:]}"
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in message))
