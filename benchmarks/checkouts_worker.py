"""One checkout's side of ``checkouts.py``: ``checkouts_worker.py BUNDLE CLIPS TOKENS``, a round for each line of input.

It is run as a file, and imports the checkout that comes first on the path.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path

from intertitle import Captioner, Decoding  # pyright: ignore[reportMissingImports]


def main() -> None:
    """Answer each line with the seconds of one round."""
    bundle, folder, tokens = sys.argv[1:]
    captioner = Captioner.load(bundle, device="cpu")
    clips = sorted(Path(folder).iterdir())
    how = Decoding(max_new_tokens=int(tokens))
    for _ in sys.stdin:
        stages: Counter[str] = Counter()
        started = time.perf_counter()
        for clip in clips:
            forget(captioner)
            stages.update(captioner.caption(clip, decoding=how, audio=False).timings)
        middle = time.perf_counter()
        forget(captioner)
        failed = [one.error for one in captioner.caption_batch(clips, decoding=how, audio=False) if one.error]
        if failed:
            raise failed[0]
        seconds = {**stages, "one_by_one": middle - started, "batch": time.perf_counter() - middle}
        print(json.dumps(seconds), flush=True)


def forget(captioner: Captioner) -> None:
    """No prompt is in the cache. A batch leaves those of its last clips there, which the next round begins with."""
    if hasattr(captioner, "forget"):
        captioner.forget()
    else:  # a checkout from before there was such a method
        captioner._scheduler = None


if __name__ == "__main__":
    main()
