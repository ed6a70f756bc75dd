"""Stand-ins for packages that CUDA code imports and that are not installed.

A stand-in has only names that compute the right thing; a kernel that cannot run raises when it is launched.
"""
