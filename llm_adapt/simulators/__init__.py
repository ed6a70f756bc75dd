"""THE DEVICES WITHOUT THE DEVICES: npu, mlu and dcu on host memory, for scripts, tests and CI.

A simulator is never chosen by detection: only `llm-adapt run --simulate`, `patch(simulate=...)`, LLM_ADAPT_SIMULATE
or pytest's --simulate start one, and the report says so on its first line. What is not modelled raises, naming
itself. What a green run is evidence of, and of what not, stands in docs/simulators.md.
"""

from llm_adapt.simulators.base import Simulator, SimulatorError
from llm_adapt.simulators.start import SIMULATORS, Simulation, enter, install, observed, parse, prepare

__all__ = [
    "SIMULATORS",
    "Simulation",
    "Simulator",
    "SimulatorError",
    "enter",
    "install",
    "observed",
    "parse",
    "prepare",
]
