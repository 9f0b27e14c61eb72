"""An engine process that does not start, and says why."""

import os
import sys

if __name__ == "__main__":
    os.write(int(sys.argv[2]), b"no room for it")
    sys.exit(1)
