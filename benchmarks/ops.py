"""The operator benchmark from a checkout: the same as `llm-adapt bench` (docs/benchmarks.md)."""

from __future__ import annotations

import sys

from llm_adapt.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
