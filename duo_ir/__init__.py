"""The IR of duo: types, SSA functions, ops, passes, kernels and their meaning. Imports neither frontends nor backends."""
