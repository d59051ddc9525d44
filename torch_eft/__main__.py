"""``python -m torch_eft``: the command ``torch-eft``."""

import sys

from torch_eft.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
