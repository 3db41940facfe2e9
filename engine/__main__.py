"""`python -m liverelay.engine`: the same as the command `liverelay`."""

import sys

from liverelay.engine.cli import main

sys.exit(main())
