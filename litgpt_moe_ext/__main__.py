"""`python -m litgpt_moe_ext` is `litgpt-moe`, even if the folder of scripts is not on the path."""

import sys

from litgpt_moe_ext.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
