"""`python -m llm_adapt.cli` is `llm-adapt`."""

import sys

if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # the current folder, which -m puts there: a random.py in it is the script's affair, not ours
    from llm_adapt.cli.main import main

    sys.exit(main())
