"""The process that runs mutants. It may crash or hang: ``pool.py`` then knows which mutant did it.

It reads seeds from stdin, a line each, and answers each with a line of JSON.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from intertitle.errors import IntertitleError

from .pool import MOST_MEMORY

_PACKAGE = str(Path(__file__).parents[2])
#: Bytes of address space after which the system refuses, so that a bomb does not take the machine.
MOST_ADDRESSES = 6 << 30


def peak_memory() -> int:
    """Bytes of memory that this process has had at most, since ``forget_peak`` where the system can forget."""
    with suppress(OSError, StopIteration), Path("/proc/self/status").open() as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """See proc(5), clear_refs."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _place(error: BaseException) -> str:
    """Where in intertitle: the innermost line of it, of a whole traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    # Helpers of the fuzzer are no part of it.
    ours = [each for each in frames if each.filename.startswith(_PACKAGE) and "/tests/" not in each.filename]
    if not ours:
        ours = list(frames)
    last = ours[-1]
    return f"{'/'.join(Path(last.filename).parts[-2:])}:{last.lineno} {last.name}"


def _failure(error: BaseException, expected: tuple[type[BaseException], ...]) -> dict[str, Any]:
    found = error
    outcome = "foreign"
    if isinstance(error, IntertitleError):
        message = str(error)
        outcome = "ours"
        if not message.isprintable():
            outcome, message = "foreign", f"a message that is not one line: {message!r}"
        cause = error.__cause__
        if isinstance(cause, MemoryError) and not isinstance(cause, expected):
            outcome = "memory"
        elif cause is not None and not isinstance(cause, (IntertitleError, *expected)):
            # Foreseen as a class, and told in one line; still perhaps a fault of ours.
            outcome, found = "wrapped", cause
    elif isinstance(error, MemoryError):
        outcome = "memory"
    kind = type(found).__name__
    return {"outcome": outcome, "kind": kind, "place": _place(found), "message": str(found)[:300]}


def run_one(target: Any, seed: int, name: str, content: bytes) -> dict[str, Any]:
    """The outcome of one mutant that neither crashes nor hangs."""
    forget_peak()
    started, before = time.process_time(), peak_memory()
    answer: dict[str, Any] = {"seed": seed, "name": name, "outcome": "ok"}
    try:
        target.run(seed, name, content)
    except Exception as error:
        answer |= _failure(error, target.expected)
    except BaseException as error:  # A PanicException of Rust is one.
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        answer |= _failure(error, target.expected)
    answer["seconds"] = round(time.process_time() - started, 4)
    # What a mutant takes, not what Python and libraries hold already.
    answer["memory"] = peak_memory() - before
    if answer["memory"] > MOST_MEMORY:
        answer |= {"outcome": "memory", "kind": answer.get("kind", ""), "place": answer.get("place", "")}
    return answer


def main() -> None:
    """``worker.py KIND FOLDER``; the folder is for originals and mutants."""
    from . import make_target

    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_ADDRESSES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    target = make_target(sys.argv[1], Path(sys.argv[2]))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        seed, _, file = line.strip().partition(" ")
        if file:
            name, content = Path(file).name, Path(file).read_bytes()
        else:
            name, content = target.make(int(seed))
        answer = run_one(target, int(seed), name, content)
        print(json.dumps(answer), file=answers, flush=True)
        if answer["memory"] > MOST_MEMORY:
            # Not every system forgets a peak: the next mutant begins in a new process.
            return


if __name__ == "__main__":
    main()
