"""`python -m miinb`: the commands of `miinb`."""

import sys

from miinb.cli import main

sys.exit(main())
