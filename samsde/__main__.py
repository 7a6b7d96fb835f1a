"""`python -m samsde` is the console script `samsde`."""
import sys
from samsde.cli import main
if __name__ == "__main__": sys.exit(main())
