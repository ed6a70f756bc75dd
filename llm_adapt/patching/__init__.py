"""The patch engine: rows, plan, fingerprints, rebinding and the post-import hook."""

from llm_adapt.patching.plan import Outcome, Plan
from llm_adapt.patching.rows import Entry, Loan, Patch, PlanItem, Row, Survey, split_target

__all__ = ["Entry", "Loan", "Outcome", "Patch", "Plan", "PlanItem", "Row", "Survey", "split_target"]
