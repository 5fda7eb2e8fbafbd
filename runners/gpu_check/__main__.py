"""Entry point of python -m runners.gpu_check."""

import sys

from runners.gpu_check import main

if __name__ == "__main__":
    sys.exit(main())
