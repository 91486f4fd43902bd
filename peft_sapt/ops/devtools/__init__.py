"""Tools for whoever works on the kernels: numerics, timings, floors, and compiling for GPUs that are not here."""
