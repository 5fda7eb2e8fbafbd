"""The experiments with the method of blpa: the command blpa-run."""

from pathlib import Path

_HERE = Path(__file__).parent

CONF = next(path for path in (_HERE / "conf", _HERE.parent / "conf") if path.is_dir())
"""The folder of YAML files: inside this package if installed, next to it in a checkout."""
