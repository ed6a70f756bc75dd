// Precompiled once for a simulator's C++ that uses torch; every source sees it first.
#pragma once
#include <ATen/ATen.h>
#include <torch/library.h>
