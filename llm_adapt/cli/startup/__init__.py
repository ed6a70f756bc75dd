"""A folder for PYTHONPATH: its sitecustomize.py patches a process before its script starts."""
