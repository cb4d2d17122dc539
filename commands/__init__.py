"""The commands of ``intertitle``, one a module.

Nothing heavy is imported until a command runs, so that ``intertitle --help`` answers at once.
"""

from __future__ import annotations

from pathlib import Path

DEMO_CLIP = Path(__file__).parent.parent / "calibration" / "clips" / "demo.mp4"

#: Exit codes besides 0: ``verify`` or items of a batch failed, bad input, Ctrl-C, and what shells show for a reader
#: that went away.
FAILED, BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
