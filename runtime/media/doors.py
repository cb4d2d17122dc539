"""What a decoder raises on a file becomes one of our errors, in one place."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import IntertitleError, MediaError, TransientMediaError

#: These say something of the machine at this moment and nothing of the file.
_TRANSIENT = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.EINTR}
_TRANSIENT |= {errno.EBUSY, errno.ETIMEDOUT, errno.ENOTCONN, errno.ENODEV, errno.ENXIO}


def reason(error: BaseException) -> str:
    """The class and the message of ``error`` in one line, cut to 300 characters."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: the disk, the network, a limit or the memory failed."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _TRANSIENT)


@contextmanager
def media_errors(name: str) -> Iterator[None]:
    """Turn what libraries raise while they read ``name`` into ``MediaError`` or ``TransientMediaError``.

    FFmpeg's errors are ``OSError`` and ``ValueError``; NumPy and PyAV raise ``ArithmeticError``, ``IndexError`` and
    ``ValueError`` where a file's numbers make no sense. Other exceptions are bugs of ours and pass.
    """
    try:
        yield
    except IntertitleError:
        raise
    except MemoryError as error:
        raise TransientMediaError(f"{name}: there is not enough memory to read it") from error
    except (OSError, ArithmeticError, ValueError, LookupError, AssertionError) as error:
        kind, said = MediaError, reason(error)
        # FFmpeg's EPERM and EIO also stand for broken data; only the system's own errors are taken at their word.
        if isinstance(error, OSError) and not type(error).__module__.startswith("av."):
            kind = TransientMediaError if is_transient(error) else MediaError
            said = error.strerror or said
        raise kind(f"{name}: cannot be read ({said})") from error
