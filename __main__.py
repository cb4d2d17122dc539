"""``python -m intertitle``: the command ``intertitle``."""

import sys

from .cli import main

sys.exit(main())
