# SPDX-License-Identifier: Apache-2.0
"""``python -m fastreid_u`` is the command ``fastreid-u``."""

import sys

from fastreid_u.cli import main

if __name__ == "__main__":
    sys.exit(main())
