"""The workloads with TensorFlow's names. duo's graph mode and TensorFlow 1's Session run the very same functions; TensorFlow 2 runs the
same models under tf.function, plain and with XLA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np

from tests.bench import data
from tests.bench.harness import Case, training, unit_of
from tests.bench.torch_style import Duo

Params = Any  # a nest of dicts, lists and tuples of variables


def nest(fn: Callable, params: Params) -> Params:
    """`fn` of every array or tensor of the nest."""
    if isinstance(params, dict):
        return {k: nest(fn, v) for k, v in params.items()}
    if isinstance(params, (list, tuple)):
        return [nest(fn, v) for v in params]
    return fn(params)


def leaves(params: Params) -> list[Any]:
    found: list[Any] = []
    nest(found.append, params)
    return found


class Models:
    """The models as functions of their variables; `tf` is the module with TensorFlow's names."""

    def __init__(self, tf: Any) -> None:
        self.tf = tf

    def mlp(self, params: Params, x: Any) -> Any:
        for i, (w, b) in enumerate(params):
            x = self.tf.matmul(self.tf.nn.relu(x) if i else x, w) + b
        return x

    def cnn(self, p: Params, x: Any) -> Any:
        tf = self.tf
        for i in ("1", "2"):
            y = tf.nn.bias_add(tf.nn.conv2d(x, p["conv" + i], [1, 1, 1, 1], "SAME"), p["bias" + i])
            x = tf.nn.max_pool2d(tf.nn.relu(y), 2, 2, "VALID")
        x = tf.reshape(x, [x.shape[0], 3136])
        x = tf.nn.relu(tf.matmul(x, p["full1"]) + p["bias3"])
        return tf.matmul(x, p["full2"]) + p["bias4"]

    def resnet(self, p: Params, x: Any) -> Any:
        tf = self.tf

        def conv(x: Any, name: str, stride: int, padding: int) -> Any:
            around = [padding, padding]
            return tf.nn.conv2d(x, p[name], [1, stride, stride, 1], [[0, 0], around, around, [0, 0]])

        def norm(x: Any, name: str) -> Any:
            weight, bias, mean, variance = p[name]
            return tf.nn.batch_normalization(x, mean, variance, bias, weight, 1e-5)

        x = tf.nn.relu(norm(conv(x, "conv", 2, 3), "norm"))
        # Padding with 0 is padding with -inf here, as nothing is negative; XLA knows no pooling with a padding of its own.
        x = tf.nn.max_pool2d(tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]]), 3, 2, "VALID")
        for name, _, _, stride in data.resnet_blocks():
            y = tf.nn.relu(norm(conv(x, name + "conv1", stride, 1), name + "norm1"))
            y = norm(conv(y, name + "conv2", 1, 1), name + "norm2")
            if name + "conv3" in p:
                x = norm(conv(x, name + "conv3", stride, 0), name + "norm3")
            x = tf.nn.relu(y + x)
        return tf.matmul(tf.reduce_mean(x, [1, 2]), p["full"]) + p["bias"]

    def gpt(self, p: Params, tokens: Any) -> Any:
        tf = self.tf
        rows, length, width = tokens.shape[0], tokens.shape[1], data.WIDTH
        size = width // data.HEADS

        def norm(x: Any, name: str) -> Any:
            weight, bias = p[name]
            mean, variance = tf.nn.moments(x, [-1], keepdims=True)
            return (x - mean) * tf.math.rsqrt(variance + 1e-5) * weight + bias

        def linear(x: Any, name: str) -> Any:
            weight, bias = p[name]
            return tf.matmul(x, weight) + bias

        x = tf.gather(p["token"], tokens) + p["position"]
        seen = tf.constant(np.tril(np.ones((length, length), bool)))
        for i in range(data.LAYERS):
            parts = tf.split(linear(norm(x, f"{i}.norm1"), f"{i}.qkv"), 3, -1)
            q, k, v = (tf.transpose(tf.reshape(a, [rows, length, data.HEADS, size]), [0, 2, 1, 3]) for a in parts)
            scores = tf.matmul(q, k, transpose_b=True) * size**-0.5
            weights = tf.nn.softmax(tf.where(seen, scores, tf.constant(-1e30)))
            y = tf.reshape(tf.transpose(tf.matmul(weights, v), [0, 2, 1, 3]), [rows, length, width])
            x = x + linear(y, f"{i}.out")
            y = tf.nn.gelu(linear(norm(x, f"{i}.norm2"), f"{i}.up"), approximate=True)
            x = x + linear(y, f"{i}.down")
        flat = tf.reshape(norm(x, "norm"), [rows * length, width])
        return tf.matmul(flat, p["token"], transpose_b=True)

    def cross_entropy(self, logits: Any, labels: Any) -> Any:
        tf = self.tf
        each = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=tf.reshape(labels, [-1]), logits=logits)
        return tf.reduce_mean(each)

    def squared_error(self, out: Any, target: Any) -> Any:
        return self.tf.reduce_mean(self.tf.square(out - target))

    def functions(self) -> dict[str, Callable]:
        tf = self.tf

        def layer_norm(a: Any, weight: Any, bias: Any) -> Any:
            mean, variance = tf.nn.moments(a, [-1], keepdims=True)
            return (a - mean) * tf.math.rsqrt(variance + 1e-5) * weight + bias

        return {
            "fused": lambda a, b, c: tf.tanh(a * b + c) * tf.sigmoid(a) - tf.exp(-c * c),
            "gelu": lambda a: tf.nn.gelu(a, approximate=True), "softmax": lambda a: tf.nn.softmax(a),
            "layer norm": layer_norm, "sum axis 0": lambda a: tf.reduce_sum(a, 0),
            "sum axis 1": lambda a: tf.reduce_sum(a, 1), "sum": lambda a: tf.reduce_sum(a),
        }  # fmt: skip

    # ------------------------------------------------------------------------------------------------ what the cases need
    def training(self, case: str) -> tuple[Callable, Callable, Params, np.ndarray, np.ndarray]:
        """(model, loss of its output and the target, arrays of its weights, inputs, targets)."""
        if case == "tiny":
            return self.mlp, self.squared_error, data.mlp_params(data.TINY), *data.tiny_batch()
        if case.startswith("mlp"):
            return self.mlp, self.cross_entropy, data.mlp_params(data.MLP), *data.mlp_batch()
        if case == "gpt":
            return self.gpt, self.cross_entropy, data.gpt_params(), *data.gpt_batch()
        x, y = data.cnn_batch()
        return self.cnn, self.cross_entropy, data.cnn_params_channels_last(), data.channels_last(x), y

    def inference(self, case: str) -> tuple[Callable, Params, np.ndarray]:
        """(model, arrays of its weights, inputs)."""
        if case == "mlp, batch 1":
            return self.mlp, data.mlp_params(data.MLP), data.mlp_batch(1)[0]
        if case == "gpt forward":
            return self.gpt, data.gpt_params(), data.gpt_batch()[0]
        if case == "cnn, batch 1":
            return self.cnn, data.cnn_params_channels_last(), data.channels_last(data.cnn_batch(1)[0])
        return self.resnet, data.hwio(data.resnet_params()), data.channels_last(data.resnet_input())


class Workloads:
    """Which cases a workload has; the classes below make them."""

    models: Models

    def train_cases(self, case: str) -> Iterator[Case]:
        raise NotImplementedError

    def forward_cases(self, case: str) -> Iterator[Case]:
        raise NotImplementedError

    def train_case(self, case: str, variant: str = "") -> Case:
        """The training step of that name."""
        return next(iter(self.train_cases(case)))

    def forward_case(self, case: str) -> Case:
        return next(iter(self.forward_cases(case)))

    def tiny(self) -> Iterator[Case]:
        yield from self.train_cases("tiny")

    def mlp(self) -> Iterator[Case]:
        yield from self.train_cases("mlp adam")
        yield from self.train_cases("mlp sgd")

    def cnn(self) -> Iterator[Case]:
        yield from self.train_cases("cnn")

    def gpt(self) -> Iterator[Case]:
        yield from self.forward_cases("gpt forward")

    def latency(self) -> Iterator[Case]:
        for case in ("mlp, batch 1", "cnn, batch 1", "ResNet-18, batch 1"):
            yield from self.forward_cases(case)


class SessionStyle(Workloads):
    """A graph, a Session, and arrays fed at each run."""

    def __init__(self, tf: Any, session: Any) -> None:
        self.tf, self.session, self.models = tf, session, Models(tf)

    def variable(self, array: np.ndarray) -> Any:
        return self.tf.Variable(array)

    def train_cases(self, case: str) -> Iterator[Case]:
        tf, run = self.tf, self.session.run
        model, loss_of, params, x, y = self.models.training(case)
        inputs, target = tf.placeholder(x.dtype, x.shape), tf.placeholder(y.dtype, y.shape)
        loss = loss_of(model(nest(self.variable, params), inputs), target)
        rule, lr = data.OPTIMIZERS[case]
        if rule == "adamw":
            raise LookupError("TensorFlow 1 has no AdamW")
        if rule == "adam":
            optimizer = tf.train.AdamOptimizer(lr, data.BETA1, data.BETA2, data.EPSILON)
        elif rule == "momentum":
            optimizer = tf.train.MomentumOptimizer(lr, data.MOMENTUM)
        else:
            optimizer = tf.train.GradientDescentOptimizer(lr)
        train = optimizer.minimize(loss)
        run(tf.global_variables_initializer())
        yield training(case, lambda: run([loss, train], {inputs: x, target: y})[0])

    def forward_cases(self, case: str) -> Iterator[Case]:
        tf, run = self.tf, self.session.run
        model, params, x = self.models.inference(case)
        inputs = tf.placeholder(x.dtype, x.shape)
        out = model(nest(self.variable, params), inputs)
        run(tf.global_variables_initializer())
        call = lambda: run(out, {inputs: x})  # noqa: E731
        yield Case(case, call, unit_of(case), lambda: [call()])


class DuoGraph(SessionStyle):
    """duo's graph mode."""

    def __init__(self, threads: int) -> None:
        import duo.graph  # here: a peer's process does without

        self.layers = Duo(threads)
        super().__init__(duo.graph, duo.graph.Session())

    def train_cases(self, case: str) -> Iterator[Case]:
        yield self.layers_case(case) if case == "gpt" else next(iter(super().train_cases(case)))

    def layers_case(self, case: str) -> Case:
        """A model of layers, and an optimiser, that eager mode has too: TensorFlow 1 has no AdamW."""
        tf, x, y = self.tf, *data.gpt_batch()
        model = self.layers.gpt_model()
        inputs, target = tf.placeholder(x.dtype, x.shape), tf.placeholder(y.dtype, y.shape)
        loss = self.layers.cross_entropy(model(inputs), target)
        train = self.layers.optimizer(case, model).minimize(loss)
        return training(case, lambda: self.session.run([loss, train], {inputs: x, target: y})[0])

    def gpt(self) -> Iterator[Case]:
        yield from self.train_cases("gpt")
        yield from self.forward_cases("gpt forward")


class TensorFlow1(SessionStyle):
    """TensorFlow's graphs and Sessions."""

    def __init__(self, threads: int) -> None:
        import tensorflow  # optional: a peer

        tf = tensorflow.compat.v1
        tf.disable_eager_execution()
        config = tf.ConfigProto(intra_op_parallelism_threads=threads, inter_op_parallelism_threads=threads)
        super().__init__(tf, tf.Session(config=config))
        self.models = Models(tensorflow)

    def variable(self, array: np.ndarray) -> Any:
        return self.tf.Variable(array, use_resource=True)


class TensorFlow(Workloads):
    """tf.function, plain and compiled by XLA; optimisers are TensorFlow's fused update ops."""

    def __init__(self, threads: int) -> None:
        import tensorflow as tf  # optional: a peer

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        self.tf, self.models = tf, Models(tf)

    WAYS: ClassVar[dict[str, Callable]] = {
        "": lambda tf, fn: tf.function(fn), "xla": lambda tf, fn: tf.function(fn, jit_compile=True), "eager": lambda tf, fn: fn,
    }  # fmt: skip

    def variants(self) -> list[tuple[str, Callable]]:
        return [(name, partial(self.WAYS[name], self.tf)) for name in ("", "xla")]

    def updater(self, rule: str, lr: float, variables: list[Any]) -> Callable[[list[Any]], None]:
        """A function that applies gradients to the variables."""
        tf, raw = self.tf, self.tf.raw_ops
        first, second = ([tf.Variable(tf.zeros_like(v)) for v in variables] for _ in range(2))
        power1, power2 = tf.Variable(data.BETA1), tf.Variable(data.BETA2)

        def update(gradients: list[Any]) -> None:
            for p, g, m, v in zip(variables, gradients, first, second):
                if rule == "sgd":
                    raw.ResourceApplyGradientDescent(var=p.handle, alpha=lr, delta=g)
                elif rule == "momentum":
                    raw.ResourceApplyMomentum(var=p.handle, accum=m.handle, lr=lr, grad=g, momentum=data.MOMENTUM)
                else:
                    if rule == "adamw":
                        p.assign_sub(p * (lr * data.DECAY))
                    raw.ResourceApplyAdam(
                        var=p.handle, m=m.handle, v=v.handle, beta1_power=power1.read_value(), beta2_power=power2.read_value(),
                        lr=lr, beta1=data.BETA1, beta2=data.BETA2, epsilon=data.EPSILON, grad=g,
                    )  # fmt: skip
            power1.assign(power1 * data.BETA1)
            power2.assign(power2 * data.BETA2)

        return update

    def train_cases(self, case: str) -> Iterator[Case]:
        for variant, _ in self.variants():
            yield self.train_case(case, variant)

    def train_case(self, case: str, variant: str = "") -> Case:
        """The training step of that name; `variant` is one of WAYS."""
        tf = self.tf
        model, loss_of, arrays, x, y = self.models.training(case)
        params, inputs, target = nest(tf.Variable, arrays), tf.constant(x), tf.constant(y)
        variables = leaves(params)
        update = self.updater(*data.OPTIMIZERS[case], variables)

        def step(x: Any, y: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = loss_of(model(params, x), y)
            update([tf.convert_to_tensor(g) for g in tape.gradient(loss, variables)])
            return loss

        compiled = self.WAYS[variant](tf, step)
        return training(case, lambda: float(compiled(inputs, target).numpy()), variant)

    def forward_cases(self, case: str) -> Iterator[Case]:
        model, arrays, x = self.models.inference(case)
        for variant, compiled in self.variants():
            params, inputs = nest(self.tf.Variable, arrays), self.tf.constant(x)
            fn = compiled(lambda x, params=params: model(params, x))
            call = lambda fn=fn, x=inputs: fn(x).numpy()  # noqa: E731
            yield Case(case, call, unit_of(case), lambda call=call: [call()], variant=variant)

    def gpt(self) -> Iterator[Case]:
        yield from self.train_cases("gpt")
        yield from self.forward_cases("gpt forward")

    def arrays(self, elements: int, label: str) -> Iterator[Case]:
        for name, fn in self.models.functions().items():
            arrays, moved = data.function_inputs(name, elements)
            inputs = [self.tf.constant(a) for a in arrays]
            for variant, compiled in self.variants():
                fast = compiled(fn)
                call = lambda fn=fast, inputs=inputs: fn(*inputs).numpy()  # noqa: E731
                yield Case(f"{name}, {label}", call, "GB/s", lambda call=call: [call()], moved, variant)

    def matmul(self) -> Iterator[Case]:
        for m, k, n in data.PRODUCTS:
            a, b = (self.tf.constant(x) for x in data.product_inputs(m, k, n))
            call = lambda a=a, b=b: self.tf.matmul(a, b).numpy()  # noqa: E731
            yield Case(f"matmul {m}x{k}x{n}", call, "GFLOP/s", lambda call=call: [call()], 2.0 * m * k * n)

    def adam(self) -> Iterator[Case]:
        for variant, compiled in self.variants():
            params, gradients = data.update_inputs()
            variables, gradients = [self.tf.Variable(p) for p in params], [self.tf.constant(g) for g in gradients]
            update = self.updater("adam", 1e-5, variables)
            step = compiled(lambda update=update, gradients=gradients: update(gradients))

            def result(step: Callable = step, variables: list[Any] = variables) -> list[np.ndarray]:
                for _ in range(3):
                    step()
                return [v.numpy() for v in variables]

            yield Case("Adam, 10M parameters", step, "ms", result, variant=variant, tolerance=1e-6)
