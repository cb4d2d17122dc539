"""The command ``intertitle``, also as ``python -m intertitle``."""

import sys


def main() -> int:
    """Run the command line and return its exit code. Ctrl-C ends it without a traceback while it is loaded, too."""
    try:
        from .cli import main as run
    except KeyboardInterrupt:
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
