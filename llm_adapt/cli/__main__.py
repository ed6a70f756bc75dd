"""`python -m llm_adapt.cli` is `llm-adapt`."""

import sys

from llm_adapt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
