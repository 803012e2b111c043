"""`python -m miinb.demo`: the demonstration, as `miinb demo`."""

import sys

from miinb.demo import main

sys.exit(main())
