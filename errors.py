"""Errors that are the user's to mend.

Every one carries a single line that says what is wrong and, where there is one, what to do. The command line prints
that line to stderr and exits with 2; anything else that is raised is a bug and shows as one.
"""

#: Longer messages lose their middle: the beginning names the file, the end says what to do.
_LONGEST = 1200


def one_line(text: str) -> str:
    """A text on one line, without control characters and bidirectional marks, of a length that can be read.

    What cannot be printed is escaped as in a Python string.
    """
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"


class IntertitleError(Exception):
    """Base of all errors that a user can cause and mend. ``message``: one line; see ``one_line``."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class OptionError(IntertitleError):
    """A setting or a combination of settings that cannot be honoured."""


class MediaError(IntertitleError):
    """A video, image or sound that cannot be read or holds nothing to caption."""


class TransientMediaError(MediaError):
    """A file that could not be read just now: the disk, the network or a limit of the machine failed, not the file."""


class ItemError(IntertitleError):
    """An item of many that failed in a way that nobody foresaw: a fault of a library or of intertitle itself."""


class CheckpointError(IntertitleError):
    """A checkpoint or adapter that is of an unknown family, incomplete, corrupt or of the wrong shape."""


class BundleError(IntertitleError):
    """A bundle that is incomplete, corrupt, tampered with or of a schema version that is not known."""


class DeadlineError(IntertitleError):
    """The deadline of a caption that passed before its first token."""


class ClosedError(IntertitleError):
    """A captioner that was closed and is used again."""


class TargetError(IntertitleError):
    """A device or runtime that is missing or cannot run what was asked of it."""
