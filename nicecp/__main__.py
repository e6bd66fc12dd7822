"""`python -m nicecp` is `nicecp`."""

from __future__ import annotations

import sys

from nicecp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
