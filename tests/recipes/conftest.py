import sys
from pathlib import Path

# Recipes are run as scripts, which import from their own folder.
sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "smollm2-64k"))
