"""One checkout's side of ``checkouts.py``: ``checkouts_worker.py BUNDLE CLIPS TOKENS``, a round for each line of input.

It is run as a file, and imports the checkout that comes first on the path.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from pathlib import Path

from intertitle import Captioner, Decoding  # pyright: ignore[reportMissingImports]

#: Stages of a caption that are not encoding: what reads the file, and the decoder.
_NOT_ENCODING = ("load", "open", "read_frames", "read_audio", "prefill", "decode")


def main() -> None:
    """Answer each line with the seconds of one round, and a hash of what was said in it."""
    bundle, folder, tokens = sys.argv[1:]
    captioner = Captioner.load(bundle, device="cpu")
    clips = sorted(Path(folder).iterdir())
    how = Decoding(max_new_tokens=int(tokens))
    for _ in sys.stdin:
        stages: Counter[str] = Counter()
        said: list[list[int]] = []
        started = time.perf_counter()
        for clip in clips:
            forget(captioner)
            caption = captioner.caption(clip, decoding=how, audio=False)
            stages.update(caption.timings)
            said.append(list(caption.token_ids))
        middle = time.perf_counter()
        forget(captioner)
        results = list(captioner.caption_batch(clips, decoding=how, audio=False))
        batch = time.perf_counter() - middle
        if failed := [one.error for one in results if one.error]:
            raise failed[0]
        # The first token of a caption comes from its prefill.
        steps = sum(map(len, said)) - len(said)
        seconds = {
            **stages,
            "decode_step": stages["decode"] / max(steps, 1),
            "prefill": stages["prefill"] / len(clips),
            "encoding": sum(value for name, value in stages.items() if name not in _NOT_ENCODING) / len(clips),
            "batch": batch,
            "one_by_one": middle - started,
        }
        tokens_of_all = hashlib.sha256(json.dumps(said).encode()).hexdigest()
        print(json.dumps({"seconds": seconds, "steps": steps, "tokens": tokens_of_all}), flush=True)


def forget(captioner: Captioner) -> None:
    """No prompt is in the cache. A batch leaves those of its last clips there, which the next round begins with."""
    if hasattr(captioner, "forget"):
        captioner.forget()
    else:  # a checkout from before there was such a method
        captioner._scheduler = None


if __name__ == "__main__":
    main()
