"""`duo.autograd`: gradients as values, with torch.autograd's names."""

from duo.eager.mode import enable_grad, no_grad, set_grad_enabled
from duo.eager.tensor import backward, grad

__all__ = ["backward", "enable_grad", "grad", "no_grad", "set_grad_enabled"]
