"""The launchers are scripts, not a package: their folder, and that of the rehearsal, made importable."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / "launch"), str(HERE)]
