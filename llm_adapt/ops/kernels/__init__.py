"""Kernels: one kernel library, one file. A file is imported when its library is first asked for."""
