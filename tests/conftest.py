"""Makes the shared fixtures beside this file importable: ``from families import FAMILIES``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
