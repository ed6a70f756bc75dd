"""The command line: llm-adapt run, doctor."""
