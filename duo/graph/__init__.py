"""Graph mode, with TensorFlow 1's names and meanings: `import duo.graph as tf`.

A graph is built once and run by a Session: `with tf.Session() as sess: sess.run(fetches, feed_dict)`. Modules of `duo.nn` and functions of
`duo.functional` work on its tensors as well, and share their parameters with eager mode.
"""

# ruff: noqa: F401
import importlib as _importlib
from collections.abc import Iterable as _Iterable
from typing import Any as _Any

from duo.graph import config as config
from duo.graph import errors as errors
from duo.graph import initializers as initializers
from duo.graph import layers as layers
from duo.graph import linalg as linalg
from duo.graph import math as math
from duo.graph import nn as nn
from duo.graph import random_ops as random
from duo.graph import test as test
from duo.graph import train as train
from duo.graph.arrays import *  # noqa: F403
from duo.graph.config import ConfigProto as ConfigProto
from duo.graph.config import GPUOptions as GPUOptions
from duo.graph.control_flow import case as case
from duo.graph.control_flow import cond as cond
from duo.graph.control_flow import gradients as gradients
from duo.graph.control_flow import hessians as hessians
from duo.graph.control_flow import while_loop as while_loop
from duo.graph.function import GraphFunction as GraphFunction
from duo.graph.function import function_layer as function_layer
from duo.graph.graph import Graph as Graph
from duo.graph.graph import get_default_graph as get_default_graph
from duo.graph.graph import reset_default_graph as reset_default_graph
from duo.graph.initializers import constant_initializer as constant_initializer
from duo.graph.initializers import glorot_normal_initializer as glorot_normal_initializer
from duo.graph.initializers import glorot_uniform_initializer as glorot_uniform_initializer
from duo.graph.initializers import identity_initializer as identity_initializer
from duo.graph.initializers import ones_initializer as ones_initializer
from duo.graph.initializers import orthogonal_initializer as orthogonal_initializer
from duo.graph.initializers import random_normal_initializer as random_normal_initializer
from duo.graph.initializers import random_uniform_initializer as random_uniform_initializer
from duo.graph.initializers import truncated_normal_initializer as truncated_normal_initializer
from duo.graph.initializers import variance_scaling_initializer as variance_scaling_initializer
from duo.graph.initializers import zeros_initializer as zeros_initializer
from duo.graph.items import Operation as Operation
from duo.graph.linalg import band_part as matrix_band_part
from duo.graph.lowering import lower as lower
from duo.graph.math import *  # noqa: F403
from duo.graph.placement import DeviceSpec as DeviceSpec
from duo.graph.random_ops import *  # noqa: F403
from duo.graph.session import InteractiveSession as InteractiveSession
from duo.graph.session import Session as Session
from duo.graph.session import get_default_session as get_default_session
from duo.graph.tensor import GraphTensor as Tensor
from duo.graph.tensor import TensorShape as TensorShape
from duo.graph.tensor import constant as constant
from duo.graph.tensor import convert_to_tensor as convert_to_tensor
from duo.graph.variables import *  # noqa: F403
from duo.graph.variables import tuple_ as tuple
from duo_ir.types import DType as DType
from duo_ir.types import bf16 as bfloat16
from duo_ir.types import bool_ as bool
from duo_ir.types import dtype as as_dtype
from duo_ir.types import f16 as float16
from duo_ir.types import f32 as float32
from duo_ir.types import f64 as float64
from duo_ir.types import i8 as int8
from duo_ir.types import i16 as int16
from duo_ir.types import i32 as int32
from duo_ir.types import i64 as int64
from duo_ir.types import u8 as uint8

half, double = float16, float64
newaxis = None


def __getattr__(name: str) -> object:
    if name != "export":  # what a script without it need not load
        raise AttributeError(f"module 'duo.graph' has no attribute {name!r}")
    globals()[name] = found = _importlib.import_module("duo.aot.export").export_session
    return found


def name_scope(name: str | None, default_name: str | None = None, values: _Any = None) -> _Any:
    """Names made inside begin with `name/`."""
    return get_default_graph().name_scope(default_name if name is None else name)


def device(device_name_or_function: _Any) -> _Any:
    """What is made inside is to run there: '/gpu:0', '/cpu:0', a function of the operation, or None (as if there were no scope around)."""
    return get_default_graph().device(device_name_or_function)


def control_dependencies(control_inputs: _Iterable[_Any] | None) -> _Any:
    """What is made inside runs together with, and after, these operations and tensors."""
    return get_default_graph().control_dependencies(control_inputs)
