"""`duo.autograd`: gradients as values, with torch.autograd's names."""

from duo.eager.gradients import backward, grad
from duo.eager.mode import enable_grad, no_grad, set_grad_enabled

__all__ = ["backward", "enable_grad", "grad", "no_grad", "set_grad_enabled"]
