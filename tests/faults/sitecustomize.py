"""Loaded by every Python that has this folder in PYTHONPATH: a clip's name says what happens when it is opened.

For the processes that read media: they die of real signals, hang and print.
"""

import ctypes
import os
import sys
import time


def act(event: str, arguments: tuple) -> None:
    """What the audit event ``open`` of a file does, by the file's name."""
    if event != "open" or not isinstance(arguments[0], (str, bytes)):
        return
    name = os.fsdecode(arguments[0]).rpartition("/")[2]
    if not name.endswith(".mp4"):
        return
    if "crash" in name:
        ctypes.string_at(0)
    elif "abort" in name:
        os.abort()
    elif "leave" in name:
        os._exit(7)
    elif "hang" in name:
        time.sleep(1000)
    elif "print" in name:
        os.write(1, b"no answer" * 100)
        print("no answer", flush=True)
        sys.__stdout__.write("no answer")
        os.write(2, b"no answer" * 10_000)
    elif "memory" in name:
        raise MemoryError
    elif "disk" in name:
        raise OSError(5, os.strerror(5))
    elif "bug" in name:
        raise RuntimeError("of our own")


sys.addaudithook(act)
