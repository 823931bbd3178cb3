"""`python -m fp4fx` is the command `fp4fx`."""

import sys

from fp4fx.cli import main

sys.exit(main())
