"""python -m runners: the command blpa-run."""

import sys

from runners.cli import main

sys.exit(main())
