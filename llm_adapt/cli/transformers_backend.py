"""The entry point for transformers' own tests: importing this module calls `llm_adapt.patch()`, on purpose.

    TRANSFORMERS_TEST_BACKEND=llm_adapt.cli.transformers_backend pytest tests/models/llama

is how transformers lets a third party prepare its test process: `transformers.testing_utils` imports the module that
the variable names before it imports a model. There is no other place for a call, so importing acts here. Nothing in
llm_adapt imports this module. Settings come from the LLM_ADAPT_* variables.

Source: testing_utils.py of transformers 5.24 ("TRANSFORMERS_TEST_BACKEND").
"""

from __future__ import annotations

import llm_adapt

llm_adapt.patch()
