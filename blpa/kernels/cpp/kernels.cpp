// The functions of any_layout.py for CPUs; cpu_build.py compiles this file, and cpu.py calls it. any_layout.py is the
// specification, and has the formulas. Codes and decoded values equal its own to the bit, so operations keep its order,
// and the compiler must not fuse a product and a sum. Batch norms have the bits of PyTorch's own, which are fused where
// a CPU can. One loop is one pass over a piece of a tensor, and is vectorised.

#include "norms.h"
#include "pooling.h"
