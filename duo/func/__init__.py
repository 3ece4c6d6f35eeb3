"""`duo.func`: functions of functions, with torch.func's names: batching, derivatives, modules as functions.

Each traces the function given into the IR, transforms that, and calls the result as one op; so they nest in any order, and work on eager
tensors, on graph tensors and under `@duo.compile`.
"""

from duo.func.batching import vmap
from duo.func.calls import functional_call, stack_module_state
from duo.func.derivatives import grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp

__all__ = [
    "functional_call", "grad", "grad_and_value", "hessian", "jacfwd", "jacrev", "jvp", "stack_module_state", "vjp", "vmap",
]  # fmt: skip
