"""``python -m bird`` is ``bird``."""

import sys

from .cli import main

sys.exit(main())
