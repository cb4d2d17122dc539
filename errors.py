"""Errors that are the user's to mend.

Every one carries a single line that says what is wrong and, where there is one, what to do. The command line prints
that line to stderr and exits with 2; anything else that is raised is a bug and shows as one.
"""


class IntertitleError(Exception):
    """Base of all errors that a user can cause and mend."""


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
    """A bundle that is incomplete, corrupt, tampered with or written by another schema version."""


class DeadlineError(IntertitleError):
    """The deadline of a caption that passed before its first token."""


class ClosedError(IntertitleError):
    """A captioner that was closed and is used again."""


class TargetError(IntertitleError):
    """A device or runtime that is missing or cannot run what was asked of it."""
