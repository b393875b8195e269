"""`python -m hrgan` is `hrgan`."""

import sys

from hrgan.cli import main

sys.exit(main())
