"""``python -m splitfx``."""

import sys

from splitfx.cli import main

sys.exit(main())
