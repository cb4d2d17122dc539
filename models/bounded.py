"""Programs that a checkpoint brings along, run where they can take neither time nor memory without end.

A chat template and the regular expressions of an adapter are such programs. They run in a child process
(``bounded_worker.py``) that has limits; the sandbox of jinja2 keeps a template from the machine, but not from looping.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

#: Seconds and bytes that a child may take. The released templates take 0.2 s, most of it for loading jinja2.
SECONDS, MEMORY = 10, 1 << 30
#: Largest answer of a child; a prompt is shorter by far.
_MOST_CHARACTERS = 1 << 16


def run_bounded(task: str, request: dict[str, Any], where: str) -> Any:
    """The answer of one of ``bounded_worker``'s tasks.

    ``CheckpointError``, beginning with ``where``, when the program fails, or takes too long or too much memory.
    """
    # The child sees the packages of this process and no folder of the user's: a checkpoint may be the current one.
    places = [place for place in sys.path if place and Path(place).is_absolute()]
    limits = {"seconds": SECONDS, "memory": MEMORY, "characters": _MOST_CHARACTERS}
    answer = _answer(json.dumps({"path": places, "task": task, "request": request, **limits}))
    if "error" in answer:
        raise CheckpointError(f"{where} {answer['error']}")
    return answer["value"]


# A checkpoint is opened several times while it is compiled and verified.
@functools.lru_cache(maxsize=64)
def _answer(message: str) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(Path(__file__).with_name("bounded_worker.py"))],
            input=message.encode(),
            capture_output=True,
            timeout=2 * SECONDS,
            check=False,
        )
        return json.loads(done.stdout)
    except OSError as error:
        raise CheckpointError(f"no process can be started for the checkpoint's programs: {error.strerror}") from error
    except (subprocess.TimeoutExpired, ValueError):
        # Without an answer: killed at a limit.
        return {"error": f"takes more than {SECONDS} s or {MEMORY >> 20} MiB"}
