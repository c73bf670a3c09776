"""``python -m bird`` runs the command ``bird``."""

import sys

from .lab.cli import main

sys.exit(main())
