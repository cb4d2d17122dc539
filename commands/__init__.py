"""The commands of ``intertitle``, one a module.

Nothing heavy is imported until a command runs, so that ``intertitle --help`` answers at once.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
DEMO_CLIP = _PACKAGE / "calibration" / "clips" / "demo.mp4"
#: The small captioner as the wheel carries it: its bundle ``captioner``, a clip that it has not seen, what is in it.
SHIPPED = _PACKAGE / "runtime" / "shipped"
#: What that bundle was compiled from, in a checkout only: the supervised checkpoint and its SynPO adapter.
SHIPPED_BASE, SHIPPED_ADAPTER = _PACKAGE / "align" / "shipped" / "base", _PACKAGE / "align" / "shipped" / "synpo"

#: Exit codes besides 0: ``verify`` or items of a batch failed, bad input, Ctrl-C, and what shells show for a reader
#: that went away.
FAILED, BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
