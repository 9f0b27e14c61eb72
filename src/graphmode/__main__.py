"""The command line's entry: ``graphmode``, or ``python -m graphmode``."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from graphmode.cli import main as run  # takes seconds, in which someone may think better of it
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
