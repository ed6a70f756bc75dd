"""Packages of the DAS index as far as public sources show them, each function a plain computation of torch.

They are served under their own names by llm_adapt.simulators.dcu.packages, and only where a DCU is simulated.
"""
