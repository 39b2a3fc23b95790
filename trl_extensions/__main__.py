"""`python -m trl_extensions` is `trl-ext`."""

import sys

from trl_extensions.cli.main import main


sys.exit(main())
