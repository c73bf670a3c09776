"""``python -m bird`` is ``bird``."""

import sys

from .lab.cli import main

sys.exit(main())
