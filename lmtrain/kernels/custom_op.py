"""Functions of tensors that torch can trace, with gradients of their own."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class CustomOp:
    """A function that is a single PyTorch operator in compiled and exported programs.

    Elsewhere a call is an `autograd.Function`, or the function itself where no gradient is needed:
    the call of an operator takes longer, and the first one takes a second.

    Args:
        name: the operator is `lmtrain::NAME`.
        function: returns new tensors. Its first argument is a tensor; if `differentiate` is called,
            no argument or result is a list.
        fake: as `function`, returns tensors of the same shapes and dtypes with any values.

    Attributes:
        operator: the PyTorch operator.
    """

    def __init__(self, name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
        self.operator = torch.library.custom_op(f"lmtrain::{name}", function, mutates_args=())
        self.operator.register_fake(fake)
        self._function = self._eager = function

    def differentiate(
        self, setup_context: Callable[..., None], backward: Callable[..., Any]
    ) -> None:
        """Adds the gradient: `setup_context` and `backward` of `autograd.Function`."""
        self.operator.register_autograd(backward, setup_context=setup_context)
        # Every call of `apply` asks for the signature, which would be derived again each time.
        vars(self._function)["__signature__"] = inspect.signature(self._function)
        function: Any = type(
            self._function.__name__,
            (torch.autograd.Function,),
            {
                "forward": staticmethod(self._function),
                "setup_context": staticmethod(setup_context),
                "backward": staticmethod(backward),
            },
        )
        self._eager = function.apply

    def __call__(self, *inputs: Any) -> Any:
        """The result of the function."""
        # A compiler traces a backward with subclasses of Tensor.
        is_plain = type(inputs[0]) in (Tensor, nn.Parameter)
        if torch.compiler.is_compiling() or not is_plain:
            return self.operator(*inputs)
        return self._eager(*inputs) if torch.is_grad_enabled() else self._function(*inputs)
