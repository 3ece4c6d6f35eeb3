"""Storage, views and in-place writes against PyTorch, and the sharing of memory with NumPy, under every flush policy."""

import gc

import ml_dtypes
import numpy as np
import pytest

import duo
from duo_ir.errors import DTypeError, DuoError, GradientError, ShapeError
from tests.frontends.eager_modes import POLICIES, agree, flush_policy, numbers

torch = pytest.importorskip("torch")


@pytest.fixture(params=list(POLICIES))
def policy(request):
    with flush_policy(request.param):
        yield request.param


def t(T, *shape, seed=0, **kw):
    return T.tensor(numbers(*shape, seed=seed, **kw))


def chain_of_views(T):
    x = t(T, 4, 6)
    a = x[1:3]
    b = a.t()
    c = b[2:5, 1]
    c += 10
    b[0] = -1
    x[2] *= 2
    return x, a, b, c


def view_of_reshape(T):
    x = t(T, 3, 4)
    v = x.view(2, 6)
    w = v.reshape(12)[3:9].view(3, 2)
    w.zero_()
    v[0, 0] = 5
    return x, v, w


def siblings(T):
    x = t(T, 6)
    a, b, c = x[:3], x[2:5], x[::2]
    a.mul_(2)
    b.add_(1)
    c.fill_(7)
    return x, a, b, c


def permuted(T):
    x = t(T, 2, 3, 4)
    p = x.permute(2, 0, 1)
    p[1] += x[:, :, 0]
    q = p.transpose(0, 2).unsqueeze(0)
    q[0, 1] = 3
    s = q.squeeze(0)
    s.flatten()
    return x, p, q, s


def split_and_chunk(T):
    x = t(T, 7, 2)
    for k, part in enumerate(x.split(3)):
        part *= k + 1
    for part in x.chunk(2, dim=1):
        part -= 1
    first, *_ = x.unbind(0)
    first.fill_(9)
    return x


def diagonal_and_narrow(T):
    x = t(T, 4, 4)
    x.diagonal().fill_(0)
    x.narrow(1, 1, 2).add_(100)
    x.select(0, 3).mul_(0.5)
    return x


def expanded_reads(T):
    x = t(T, 3, 1)
    e = x.expand(3, 4)
    x += 1
    return e, x


def clone_is_apart(T):
    x = t(T, 3)
    c, d = x.clone(), x.detach()
    x += 1
    d *= 2
    return x, c, d


def set_items(T):
    x = t(T, 5, 4)
    x[0] = 1
    x[1, 2] = -3.5
    x[2:4, ::2] = t(T, 2, 2, seed=5)
    x[:, -1] = t(T, 5, seed=6)
    x[..., 0] = 2
    x[T.tensor([0, 3])] = t(T, 4, seed=7)
    x[x > 1.5] = 0
    x[T.tensor([1, 2]), T.tensor([0, 1])] = T.tensor([8.0, 9.0])
    x[[4]] = 5
    x[2, T.tensor([1, 3])] += 4
    return x


def get_items(T):
    x = t(T, 4, 5, 3)
    i = T.tensor([2, 0, -1])
    return [
        x[1], x[-1, 2], x[:, 1:4:2], x[..., 1], x[None, 0], x[i], x[:, i], x[i, i], x[i[:, None], i], x[x[:, 0, 0] > 0],
        x[1:3, i, 0], x[[0, 2]], x[0, :, i], x[:, None, i],
    ]  # fmt: skip


def in_place_ops(T):
    x, y = t(T, 4), t(T, 4, seed=1)
    x += y
    x -= 1
    x *= 3
    x /= 2
    x **= 2
    z = x
    x.add_(y, alpha=2)
    x.clamp_(0.1, 3)
    x.sqrt_().exp_().neg_()
    x.copy_(x + y.double())
    x.lerp_(y, 0.25)
    return x, z, z is x


def in_place_ints(T):
    x = T.arange(6)
    x += 2
    x //= 3
    x <<= 2
    x |= 1
    x ^= T.tensor([1, 0, 1, 0, 1, 0])
    b = x > 3
    b &= x < 9
    return x, b


def swap_rows(T):
    x = t(T, 4, 3)
    x[0], x[1] = x[1].clone(), x[0].clone()
    row = x[2]
    x[2] = x[3]
    x[3] = row  # row is a view: it has already been overwritten
    return x


def self_overlapping_copy(T):
    x = t(T, 6)
    x[:3] = x[3:] + 0
    x[1:] = x[:-1].clone()
    return x


def loop_of_writes(T):
    x = T.zeros(8)
    for i in range(8):
        x[i] = i * i
        if i % 3 == 2:
            x[: i + 1] += x[i].clone()
    return x, x.sum()


def long_chain_read_late(T):
    x = t(T, 3, 3)
    v = x[1]
    for i in range(5):
        x.t()[i % 3] += v.clone()
    return v, x


def detach_of_a_view(T):
    x = t(T, 3, 4)
    d = x[1].detach()
    d += 5
    x[1, 0] = 0
    return x, d


def data_of_a_view(T):
    x = t(T, 3, 4)
    x[1].data[2:] = 1
    return x


def view_outlives_base(T):
    x = t(T, 3, 4)
    v = x[1]
    x += 1
    del x
    v *= 2
    return v


def bool_masks(T):
    x = t(T, 3, 4)
    mask = x > 0
    x[mask] *= -1
    x.masked_fill_(~mask, 3.0)
    return x, mask


PROGRAMS = [f for f in list(globals().values()) if callable(f) and getattr(f, "__module__", "") == __name__]
PROGRAMS = [f for f in PROGRAMS if f.__name__ not in ("t", "policy") and not f.__name__.startswith("test")]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: getattr(f, "__name__", str(f)))
def test_as_in_torch(program):
    agree(program, torch)


def test_in_place_keeps_the_dtype(policy):
    x = duo.ones(3)
    x += duo.ones(3, dtype=duo.float64)
    assert x.dtype is duo.float32
    i = duo.arange(3)
    with pytest.raises(DTypeError):
        i += 0.5


def test_writes_to_an_expanded_view_are_refused(policy):
    x = duo.zeros(3, 1)
    with pytest.raises(ShapeError, match="clone"):
        x.expand(3, 4).add_(1)
    with pytest.raises(ShapeError, match="clone"):
        x.expand(3, 4)[0] = 1
    assert x.tolist() == [[0], [0], [0]]


def test_a_write_of_another_shape_is_refused(policy):
    x = duo.zeros(3)
    for bad in (lambda: x.copy_(duo.zeros(2, 3)), lambda: x.add_(duo.zeros(2, 3)), lambda: x.copy_(duo.zeros(2))):
        with pytest.raises(ShapeError):
            bad()
    with pytest.raises(DuoError):
        x[5] = 1
    assert x.tolist() == [0, 0, 0]


# ------------------------------------------------------------------------------------------------------------ NumPy
DTYPES = ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool", ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,), (2, 0, 3), (3, 4), (70, 3)])
def test_round_trip(policy, dtype, shape):
    if policy not in ("lazy", "sync"):
        pytest.skip("one op only")
    a = numbers(*shape, dtype=np.float64, low=0, high=100).astype(dtype)
    for make in (duo.from_numpy, duo.tensor, duo.as_tensor):
        x = make(a)
        assert x.numpy().dtype == a.dtype and x.shape == a.shape and np.array_equal(x.numpy(), a)
        assert np.array_equal((x + x).numpy(), a + a) or a.dtype == bool
        assert np.array_equal(x.clone().numpy(), a)


def address(array):
    return array.__array_interface__["data"][0]


def test_asarray_does_not_copy(policy):
    x = duo.tensor(numbers(300)) * 2
    a = np.asarray(x)
    assert address(a) == address(x.numpy()) == address(np.asarray(x.detach()))
    w = duo.tensor(numbers(300), requires_grad=True)
    assert address(np.asarray(w.detach())) == address(w.detach().numpy())
    with pytest.raises(GradientError, match="detach"):
        np.asarray(w)
    with pytest.raises(GradientError, match="detach"):
        w.numpy()


def test_numpy_shares_memory_both_ways(policy):
    x = duo.zeros(5)
    a = x.numpy()
    a[1] = 7
    assert x.tolist() == [0, 7, 0, 0, 0]
    x += 1
    assert a.tolist() == [1, 8, 1, 1, 1]
    x[2:4] = 5
    assert a.tolist() == [1, 8, 5, 5, 1]
    view = x[1:3]
    a[2] = -2
    assert view.tolist() == [8, -2]
    view.mul_(10)
    assert a.tolist() == [1, 80, -20, 5, 1]
    a += 1
    assert x.sum().item() == 72


def test_from_numpy_shares_memory_both_ways(policy):
    a = np.arange(6, dtype=np.float32)
    x = duo.from_numpy(a)
    a[0] = 9
    assert x[0].item() == 9
    x[5] = -1
    x *= 2
    assert a.tolist() == [18, 2, 4, 6, 8, -2]
    assert address(x.numpy()) == address(a)
    y = x.view(2, 3)
    a[:] = 1
    assert y.sum().item() == 6
    y[1] = 4
    assert a.tolist() == [1, 1, 1, 4, 4, 4]


def test_results_asked_for_never_change(policy):
    a = np.arange(4, dtype=np.float32)
    x = duo.from_numpy(a)
    y = x * 2
    a[:] = 0
    assert y.tolist() == [0, 2, 4, 6]
    z = x + 1
    a += 5
    w = x + 1
    assert z.tolist() == [1, 1, 1, 1] and w.tolist() == [6, 6, 6, 6]
    c = duo.tensor(a)
    v = x[1:3] * 1
    a[:] = -1
    assert c.tolist() == [5, 5, 5, 5] and v.tolist() == [5, 5]


def test_results_of_numpy_views_never_change(policy):
    x = duo.ones(4)
    a = x.numpy()
    y = x * 3
    a[:] = 0
    assert y.tolist() == [3, 3, 3, 3] and (x + 1).tolist() == [1, 1, 1, 1]
    del a
    gc.collect()
    y = x + 4
    x += 1
    assert y.tolist() == [4, 4, 4, 4] and x.tolist() == [1, 1, 1, 1]


def test_arrays_keep_to_their_tensor(policy):
    """Writing to an array changes the tensors that alias its tensor, and nothing that merely had the same values."""
    w = duo.tensor(numbers(300), requires_grad=True)
    before = w.tolist()
    y, c, d = w * 1, w.clone(), w.detach()
    saved = (w * w).sum()
    saved.item()
    a = w.detach().numpy()
    a[:] = 0
    assert y.tolist() == c.tolist() == before and w.tolist() == d.tolist() == [0] * 300
    saved.backward()
    assert w.grad.tolist() == [2 * v for v in before]
    seen = []
    w.register_hook(seen.append)
    w.grad = None
    (w + 1).sum().backward()
    w.grad.numpy()[:] = 5
    assert seen[0].tolist() == [1] * 300 and w.grad.tolist() == [5] * 300


@pytest.mark.parametrize("read", [lambda t: t.detach(), lambda t: t.data], ids=["detach", "data"])
def test_detaching_what_is_there_records_nothing(policy, read):
    w = duo.tensor(numbers(40), requires_grad=True)
    before = w.tolist()
    for t in (w, duo.tensor(before), duo.tensor(before)[5:30], read(w)):
        t.tolist()
        duo.synchronize()
        d = read(t)
        assert d._value().buf is t._value().buf and not d.requires_grad and d.is_leaf
        assert d.tolist() == t.tolist()
    d = read(w)
    e = read(d)
    a = d.numpy()
    a[3] = 100
    assert w[3].item() == d[3].item() == e[3].item() == 100
    e[4] = -1
    with duo.no_grad():
        w[5] = 8
    assert a[4] == w[4].item() == d[4].item() == -1 and a[5] == d[5].item() == 8
    y = (w * w).sum()
    y.item()
    d.requires_grad_()
    d.sum().backward()
    assert d.grad.tolist() == [1] * 40 and w.grad is None
    y.backward()
    assert w.grad.tolist() == [2 * v for v in w.tolist()]


def test_a_write_to_what_was_detached_is_seen_by_backward(policy):
    """Where detach() shared the value itself, as where it did not; a write through .data is not seen."""
    for read, seen in ((lambda t: t.detach(), True), (lambda t: t.data, False)):
        for x in (duo.tensor([1.0, 2.0]), duo.tensor([1.0, 2.0], requires_grad=True)):
            w = duo.tensor([3.0, 4.0], requires_grad=True)
            x.tolist()
            d = read(x)
            y = (w * d).sum()
            z = (w * x).sum()
            y.item(), z.item()
            d.mul_(2)
            assert x.tolist() == [2, 4]
            if seen:
                for loss in (y, z):
                    with pytest.raises(GradientError, match="overwritten"):
                        loss.backward()
                continue
            y.backward()
            assert w.grad.tolist() == [1, 2]


def test_history_survives_sharing(policy):
    w = duo.tensor([1.0, 2.0], requires_grad=True)
    y = w * 3
    a = y.detach().numpy()
    y.sum().backward()
    assert w.grad.tolist() == [3, 3] and a.tolist() == [3, 6]
    y += w
    assert a.tolist() == [4, 8]
    y[0].backward()
    assert w.grad.tolist() == [7, 3]


def test_a_slice_of_a_dead_array_still_shares(policy):
    x = duo.zeros(6)
    part = x.numpy()[2:4]
    gc.collect()
    part[:] = 3
    assert x.tolist() == [0, 0, 3, 3, 0, 0]
    x += 1
    assert part.tolist() == [4, 4]
    for _ in range(3000):
        x.numpy()
    assert x.tolist() == [1, 1, 4, 4, 1, 1]
    view = x[2:]
    part[:] = 9
    del part
    gc.collect()
    assert view.tolist() == [9, 9, 1, 1]


def test_a_kept_array_is_never_overwritten(policy):
    keep = [(duo.full((100 + k,), float(k)) + 0).numpy() for k in range(20)]
    gc.collect()
    for k in range(20):
        x = duo.randn(100 + k) * 2
        x.sum().item()
        x += 1
        x.numpy()
    for k, a in enumerate(keep):
        assert (a == k).all()


def test_an_array_outlives_its_tensor_through_training(policy):
    w = duo.zeros(64, requires_grad=True)
    opt = duo.optim.SGD([w], lr=1.0)
    seen = []
    for _ in range(4):
        (w * 2).sum().backward()
        opt.step()
        opt.zero_grad()
        seen.append(w.detach().clone().numpy())
    alias = w.detach().numpy()
    (w * 2).sum().backward()
    opt.step()
    assert [s[0] for s in seen] == [-2, -4, -6, -8] and all((s == s[0]).all() for s in seen)
    assert (alias == -10).all() and w.tolist() == alias.tolist()


def test_arrays_of_other_layouts(policy):
    a = np.arange(24, dtype=np.float32).reshape(4, 6)
    for b in (a.T, a[::2], a[:, ::-1], a[1:, 2:5], np.asfortranarray(a), a[1], np.broadcast_to(a[:1], (3, 6))):
        for make in (duo.from_numpy, duo.tensor):
            x = make(b)
            assert np.array_equal(x.numpy(), b) and np.array_equal((x * 2).numpy(), b * 2)
    swapped = a.astype(">f4")
    assert np.array_equal(duo.tensor(swapped).numpy(), a)
    frozen = a.copy()
    frozen.flags.writeable = False
    x = duo.from_numpy(frozen)
    x += 1
    assert np.array_equal(frozen, a) and np.array_equal(x.numpy(), a + 1)


def test_a_slice_of_an_array_shares(policy):
    a = np.zeros(10, np.float32)
    x = duo.from_numpy(a[2:6])
    y = x + 1
    a[:] = 3
    assert y.tolist() == [1] * 4 and x.tolist() == [3] * 4
    x.fill_(8)
    assert a.tolist() == [3, 3, 8, 8, 8, 8, 3, 3, 3, 3]


def test_gradients_with_shared_arrays(policy):
    a = np.arange(3, dtype=np.float32)
    w = duo.from_numpy(a).requires_grad_()
    y = (w * w).sum()
    a[:] = 100
    y.backward()
    assert w.grad.tolist() == [0, 2, 4]
    with duo.no_grad():
        w -= w.grad
    assert a.tolist() == [100, 98, 96]


def test_mixing_with_numpy(policy):
    x = duo.ones(3)
    a = np.arange(3, dtype=np.float32)
    assert (x + a).tolist() == [1, 2, 3] and (a + x).tolist() == [1, 2, 3] and isinstance(a * x, duo.Tensor)
    assert (x * np.float32(2)).tolist() == [2, 2, 2] and (np.float64(2) * x).dtype is duo.float32
    x += a
    assert x.tolist() == [1, 2, 3]
    assert np.array(x).tolist() == [1, 2, 3] and np.stack([x, x]).shape == (2, 3)
    assert np.array(x, dtype=np.float64).dtype == np.float64
    x[0] = np.float32(5)
    x[1:] = a[:2]
    assert x.tolist() == [5, 0, 1]


def test_memory_is_given_back(policy):
    """A long loop does not keep buffers: what is alive at the end is what is referenced."""
    if policy.startswith("random"):
        pytest.skip("every random path is remembered")
    w = duo.zeros(1000, requires_grad=True)
    opt = duo.optim.Adam([w], lr=0.1)
    state_before = None
    for k in range(60):
        loss = ((w - 1) ** 2).mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        if k % 7 == 0:
            loss.item()
        w.data.mul_(1.0)
        if k == 30:
            gc.collect()
            state_before = len(gc.get_objects())
    gc.collect()
    assert len(gc.get_objects()) - state_before < 3000


@pytest.mark.parametrize("views", [False, True], ids=["array", "view"])
def test_views_and_rows_of_shared_memory_are_read_at_once(policy, views):
    """What is read of an array through indices has the array's values of that moment, and views go on following the array."""
    whole = numbers(40, 6, dtype=np.float32)
    a = whole[8:32] if views else whole
    x = duo.from_numpy(a)
    rows = np.array([5, 2, 5, -1])
    read = {
        "slice": lambda v: v[3:9], "step": lambda v: v[::5, 1:4], "row": lambda v: v[4], "all": lambda v: v[:],
        "slice of slice": lambda v: v[3:20][2:9], "rows": lambda v: v[rows], "columns": lambda v: v[:, [0, 3]], "pairs": lambda v: v[rows, [1, 2, 0, 5]],
    }  # fmt: skip
    for name, of in read.items():
        before = of(a).copy()
        got = of(x)
        doubled, moved = got * 2, (got.t() if len(got.shape) == 2 else got) + 0
        a += 1
        assert np.array_equal(doubled.numpy(), before * 2) and np.array_equal(moved.numpy(), before.T), name
        follows = name not in ("rows", "columns", "pairs")
        assert np.array_equal(got.clone().numpy(), before + 1 if follows else before), name
    flat = x.reshape(-1)
    kept = flat * 1
    a[:] = 7
    assert kept.numpy()[0] != 7 and flat.sum().item() == 7 * a.size
    x[duo.tensor([0, 3])] = -1
    assert (a[[0, 3]] == -1).all() and (a[1:3] == 7).all()
    with pytest.raises(IndexError):
        x[duo.tensor([100])].tolist()
    assert x[1].tolist() == [7] * 6
    w = duo.tensor(numbers(6), requires_grad=True)
    y = (x[4:7] * w).sum()
    a[:] = 0
    y.backward()
    assert w.grad.tolist() == [21] * 6


def test_large_clones_have_memory_of_their_own():
    """Copied by all threads, from 32 MiB on."""
    x = duo.arange(9 << 20)
    y = x.clone()
    values = y.numpy()
    x += 1
    assert np.array_equal(values, np.arange(9 << 20)) and np.array_equal(x.numpy(), values + 1)
