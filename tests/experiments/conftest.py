import sys
from pathlib import Path

# Experiments are run as scripts: shared modules are imported from their folder.
sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
