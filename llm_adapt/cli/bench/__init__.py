"""llm-adapt bench: every operator beside what frameworks run without us, proved before it is timed."""

from llm_adapt.cli.bench.command import add_arguments, add_parser, run_bench

__all__ = ["add_arguments", "add_parser", "run_bench"]
