"""Recurrent layers and cells with torch.nn's parameters, names and gate orders: RNN, LSTM (Hochreiter & Schmidhuber 1997; Gers et al. 2000), GRU (Cho et al. 2014).

A layer walks the steps in Python, so the program has one copy of the cell for each; where the length of a sequence is free (`"f32[batch,length,8]"` of
an export), it is a loop of the program, without gradients. What depends on the input alone is one product for all steps.
"""

from __future__ import annotations

import math
from typing import Any

from duo.control import while_loop
from duo.dispatch import apply
from duo.eager.creation import empty
from duo.functional import cat, chunk, index_copy, sigmoid, stack, tanh, zeros_like
from duo.functional._args import type_of
from duo.nn import functional as F
from duo.nn import init
from duo.nn.module import Module
from duo.nn.parameter import Parameter
from duo_ir.core import Value
from duo_ir.errors import ArgumentError, ShapeError
from duo_ir.ops import broadcasting as nd
from duo_ir.types import i64

State = Any  # h, or (h, c) of an LSTM


# Cells: what of the input and of the state adds up to the gates, and the state before -> the state after.
def _rnn_tanh(x: Any, h: Any, state: State) -> State:
    """h' = tanh(W_ih x + b_ih + W_hh h + b_hh)."""
    return tanh(x + h)


def _rnn_relu(x: Any, h: Any, state: State) -> State:
    """h' = relu(W_ih x + b_ih + W_hh h + b_hh)."""
    return F.relu(x + h)


def _lstm(x: Any, h: Any, state: State) -> State:
    """c' = f*c + i*g; h' = o*tanh(c'), where i, f, o are sigmoids and g is a tanh of the four parts of the gates."""
    i, f, g, o = chunk(x + h, 4, -1)
    c = sigmoid(f) * state[1] + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


def _gru(x: Any, h: Any, state: State) -> State:
    """n = tanh(x_n + r*h_n); h' = (1 - z)*n + z*h, where r and z are sigmoids of the first two parts of the gates."""
    xr, xz, xn = chunk(x, 3, -1)
    hr, hz, hn = chunk(h, 3, -1)
    n = tanh(xn + sigmoid(xr + hr) * hn)
    z = sigmoid(xz + hz)
    return (1 - z) * n + z * state


_CELLS = {
    "RNN_TANH": (_rnn_tanh, 1),
    "RNN_RELU": (_rnn_relu, 1),
    "LSTM": (_lstm, 4),
    "GRU": (_gru, 3),
}  # and parts of the gates


class RNNBase(Module):
    """Base of the recurrent layers. mode: 'RNN_TANH', 'RNN_RELU', 'LSTM' or 'GRU'."""

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if mode not in _CELLS:
            raise ArgumentError(f"{mode!r} is no recurrent cell; there are {', '.join(_CELLS)}")
        if hidden_size <= 0 or num_layers <= 0:
            raise ArgumentError(
                f"{mode}: hidden_size and num_layers must be above 0, not {hidden_size} and {num_layers}"
            )
        if not 0 <= dropout <= 1:
            raise ArgumentError(f"{mode}: dropout must be from 0 to 1, not {dropout}")
        self.mode, self.input_size, self.hidden_size, self.num_layers = mode, input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, dropout, bidirectional
        rows, directions = _CELLS[mode][1] * hidden_size, 1 + bidirectional
        for layer in range(num_layers):
            width = input_size if layer == 0 else hidden_size * directions
            for suffix in self._suffixes(layer):
                shapes: list[tuple[str, tuple[int, ...]]] = [
                    ("weight_ih", (rows, width)),
                    ("weight_hh", (rows, hidden_size)),
                ]
                shapes += [("bias_ih", (rows,)), ("bias_hh", (rows,))] if bias else []
                for name, shape in shapes:
                    setattr(self, name + suffix, Parameter(empty(*shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}", f"_l{layer}_reverse"][: 1 + self.bidirectional]

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(hidden_size)."""
        bound = 1 / math.sqrt(self.hidden_size)
        for p in self.parameters():
            init.uniform_(p, -bound, bound)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        for name, default in (
            ("num_layers", 1),
            ("bias", True),
            ("batch_first", False),
            ("dropout", 0.0),
            ("bidirectional", False),
        ):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text

    def forward(self, input: Any, hx: State = None) -> tuple[Any, State]:
        """input: [length, batch, input_size] ([batch, length, ...] with batch_first; without batch: [length, input_size]). hx: the first state,
        [layers * directions, batch, hidden_size] (an LSTM: two of them), zeros by default. Gives the output of the last layer, [length, batch,
        directions * hidden_size], and the last state. Raises ShapeError."""
        name = type(self).__name__
        batched = len(input.shape) == 3
        if len(input.shape) not in (2, 3) or input.shape[-1] != self.input_size:
            raise ShapeError(
                f"{name}: input {list(input.shape)} is not [length, batch, {self.input_size}] or [length, {self.input_size}]"
            )
        x = input.transpose(0, 1) if batched and self.batch_first else input
        if type_of(x).shape[0] == 0:
            raise ShapeError(f"{name}: a sequence needs a step; the input is {list(input.shape)}")
        states = self._first(x, hx, batched)
        last: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for k, suffix in enumerate(self._suffixes(layer)):
                state = states[layer * (1 + self.bidirectional) + k] if states is not None else None
                out, state = self._walk(x, state, suffix, reverse=k == 1)
                outputs.append(out)
                last.append(state)
            x = outputs[0] if len(outputs) == 1 else cat(outputs, -1)
            if self.dropout and layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, self.training)
        out = x.transpose(0, 1) if batched and self.batch_first else x
        if self.mode == "LSTM":
            return out, (stack([h for h, _ in last], 0), stack([c for _, c in last], 0))
        return out, stack(last, 0)

    def _first(self, x: Any, hx: State, batched: bool) -> list[State] | None:
        """The first states of all layers and directions; None: zeros."""
        if hx is None:
            return None
        parts = hx if self.mode == "LSTM" else (hx,)
        count = self.num_layers * (1 + self.bidirectional)
        want = [count, x.shape[1], self.hidden_size] if batched else [count, self.hidden_size]
        for p in parts:
            if list(p.shape) != want:
                raise ShapeError(f"{type(self).__name__}: the first state is {list(p.shape)}, not {want}")
        return [tuple([p[k] for p in parts]) if self.mode == "LSTM" else hx[k] for k in range(count)]

    def _walk(self, x: Any, state: State, suffix: str, reverse: bool) -> tuple[Any, State]:
        cell = _CELLS[self.mode][0]
        given = [getattr(self, f"{n}{suffix}") for n in ("weight_ih", "weight_hh")]
        biases = [getattr(self, f"{n}{suffix}") if self.bias else None for n in ("bias_ih", "bias_hh")]
        gates = F.linear(x, given[0], biases[0])
        if state is None:
            zero = zeros_like(gates[0])[..., : self.hidden_size]
            state = (zero, zero) if self.mode == "LSTM" else zero
        if not isinstance(type_of(x).shape[0], int):
            return self._loop(gates, state, given[1], biases[1], reverse)
        steps = range(x.shape[0])
        outputs = []
        for t in reversed(steps) if reverse else steps:
            h = state[0] if self.mode == "LSTM" else state
            state = cell(gates[t], F.linear(h, given[1], biases[1]), state)
            outputs.append(state[0] if self.mode == "LSTM" else state)
        return stack(outputs[::-1] if reverse else outputs, 0), state


    def _loop(self, gates: Any, state: State, weight: Any, bias: Any, reverse: bool) -> tuple[Any, State]:
        """The walk over a number of steps that is known when the program runs. There is no gradient through it."""
        cell, lstm = _CELLS[self.mode][0], self.mode == "LSTM"
        steps = apply(_steps, (gates,))

        def step(k: Any, outputs: Any, *state: Any) -> tuple[Any, ...]:
            t = steps - 1 - k if reverse else k
            new = cell(gates[t], F.linear(state[0], weight, bias), state if lstm else state[0])
            new = new if lstm else (new,)
            return (k + 1, index_copy(outputs, 0, t.reshape(1), new[0].unsqueeze(0)), *new)

        outputs = zeros_like(gates)[..., : self.hidden_size]
        carried = (zeros_like(steps), outputs, *(state if lstm else (state,)))
        _, out, *last = while_loop(lambda k, *_: k < steps, step, carried)
        return out, tuple(last) if lstm else last[0]


def _steps(x: Value) -> Value:
    """The length of a sequence, of which there must be a step."""
    return nd.size_of(x.type.shape[0], i64, least=1)


class RNN(RNNBase):
    """A recurrent layer of h' = tanh (or, nonlinearity='relu', relu) of W_ih x + b_ih + W_hh h + b_hh. See `RNNBase.forward`."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ArgumentError(f"RNN: nonlinearity is 'tanh' or 'relu', not {nonlinearity!r}")
        self.nonlinearity = nonlinearity
        super().__init__(f"RNN_{nonlinearity.upper()}", input_size, hidden_size, num_layers, *args, **kwargs)


class LSTM(RNNBase):
    """Long short-term memory; gates in the order input, forget, cell, output. See `RNNBase.forward`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)


class GRU(RNNBase):
    """Gated recurrent unit; gates in the order reset, update, new. See `RNNBase.forward`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("GRU", *args, **kwargs)


class RNNCellBase(Module):
    """Base of the cells: one step."""

    mode: str

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        rows = _CELLS[self.mode][1] * hidden_size
        self.weight_ih = Parameter(empty(rows, input_size, device=device, dtype=dtype))
        self.weight_hh = Parameter(empty(rows, hidden_size, device=device, dtype=dtype))
        for name in ("bias_ih", "bias_hh"):
            if bias:
                setattr(self, name, Parameter(empty(rows, device=device, dtype=dtype)))
            else:
                self.register_parameter(name, None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(hidden_size)."""
        bound = 1 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0
        for p in self.parameters():
            init.uniform_(p, -bound, bound)

    def forward(self, input: Any, hx: State = None) -> State:
        """input: [batch, input_size] or [input_size]; hx: the state, zeros by default. Gives the next state: h, or an LSTM's (h, c)."""
        if input.shape[-1] != self.input_size:
            raise ShapeError(
                f"{type(self).__name__}: input {list(input.shape)} needs {self.input_size} elements in its last dim"
            )
        x = F.linear(input, self.weight_ih, self.bias_ih)
        if hx is None:
            zero = zeros_like(x)[..., : self.hidden_size]
            hx = (zero, zero) if self.mode == "LSTM" else zero
        h = hx[0] if self.mode == "LSTM" else hx
        return _CELLS[self.mode][0](x, F.linear(h, self.weight_hh, self.bias_hh), hx)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}" + ("" if self.bias else ", bias=False")


class RNNCell(RNNCellBase):
    """One step of RNN."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ArgumentError(f"RNNCell: nonlinearity is 'tanh' or 'relu', not {nonlinearity!r}")
        self.nonlinearity, self.mode = nonlinearity, f"RNN_{nonlinearity.upper()}"
        super().__init__(input_size, hidden_size, bias, device, dtype)


class LSTMCell(RNNCellBase):
    """One step of LSTM."""

    mode = "LSTM"


class GRUCell(RNNCellBase):
    """One step of GRU."""

    mode = "GRU"
