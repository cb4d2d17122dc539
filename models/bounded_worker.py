"""The child process of ``bounded.py``: one request from stdin, one answer to stdout, within limits.

It is run as a file and imports nothing of intertitle, so that it starts in tens of milliseconds.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any


def render(request: dict[str, Any]) -> str:
    """A chat template in the sandbox and with the settings that transformers uses (utils/chat_template_utils.py)."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(request["template"]).render(
        messages=request["messages"], add_generation_prompt=True, **request["tokens"]
    )


def match(request: dict[str, Any]) -> list[int | None]:
    """For each name the first pattern that, by PEFT's rule, is the name or ends it after a dot; ``None`` for none."""
    patterns = []
    for pattern in request["patterns"]:
        try:
            patterns.append(re.compile(rf"(.*\.)?({pattern})"))
        except re.error as error:
            raise ValueError(f"{pattern[:80]} is no regular expression ({error})") from None
    found = ((place for place, pattern in enumerate(patterns) if pattern.fullmatch(name)) for name in request["names"])
    return [next(places, None) for places in found]


def main() -> None:
    """Answer the request with ``{"value": …}`` or ``{"error": reason}``."""
    message = json.load(sys.stdin)
    sys.path[:] = message["path"]
    try:
        import resource
    except ImportError:  # not on Windows
        pass
    else:
        resource.setrlimit(resource.RLIMIT_AS, (message["memory"], message["memory"]))
        resource.setrlimit(resource.RLIMIT_CPU, (message["seconds"], message["seconds"]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        value = {"render": render, "match": match}[message["task"]](message["request"])
        if isinstance(value, str) and len(value) > message["characters"]:
            raise ValueError(f"gives {len(value)} characters")
        answer: dict[str, Any] = {"value": value}
    except MemoryError:
        answer = {"error": "takes too much memory"}
    except ImportError as error:
        answer = {"error": f"needs jinja2: pip install 'intertitle[compile]' ({error})"}
    # The program is the checkpoint's own: it can fail in any way.
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        verb = "rendered" if message["task"] == "render" else "used"
        answer = {"error": f"cannot be {verb}: {lines[0][:300]}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
