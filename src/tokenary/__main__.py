"""``python -m tokenary``: the command line."""

import sys

from tokenary.cli import main

sys.exit(main())
