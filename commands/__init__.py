"""The commands of ``intertitle``, one a module.

Nothing heavy is imported until a command runs, so that ``intertitle --help`` answers at once.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
DEMO_CLIP = _PACKAGE / "calibration" / "clips" / "demo.mp4"
#: The small captioner: ``base``, the adapter ``synpo``, and a clip that it has not seen with what is in it.
SHIPPED = _PACKAGE / "align" / "shipped"

#: Exit codes besides 0: ``verify`` or items of a batch failed, bad input, Ctrl-C, and what shells show for a reader
#: that went away.
FAILED, BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
