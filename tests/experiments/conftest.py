import sys
from pathlib import Path

# Experiments are run as scripts: what they share is imported from beside them.
sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
