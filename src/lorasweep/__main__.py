"""``python -m lorasweep`` is the command ``lorasweep``."""

import sys

from lorasweep.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
