"""Models and their losses as users write them: one source, which runs with PyTorch's namespaces and with duo's."""

import math


def zoo(T, nn, F):
    """name: (class, arrays from a generator of random numbers, loss of a model and tensors of these), with `torch` or `duo` and its `nn` and `functional`."""
    models = {}

    class ConvNeXt(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 4, stride=4)
            self.dw = nn.Conv2d(16, 16, 7, padding=3, groups=16)
            self.n = nn.LayerNorm(16)
            self.p1 = nn.Linear(16, 64)
            self.p2 = nn.Linear(64, 16)
            self.g = nn.Parameter(T.ones(16) * 1e-1)
            self.h = nn.Linear(16, 10)

        def forward(self, x):
            x = self.stem(x)
            r = x
            x = self.dw(x).permute(0, 2, 3, 1)
            x = self.p2(F.gelu(self.p1(self.n(x)))) * self.g
            x = r + x.permute(0, 3, 1, 2)
            return self.h(x.mean([-2, -1]))

    models["convnext"] = (
        ConvNeXt,
        lambda r: (r.standard_normal((4, 3, 32, 32)).astype("f4"), r.integers(0, 10, 4)),
        lambda m, x, y: F.cross_entropy(m(x), y),
    )

    class MBConv(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 24, 1, bias=False)
            self.b1 = nn.BatchNorm2d(24)
            self.d = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
            self.b2 = nn.BatchNorm2d(24)
            self.s1 = nn.Conv2d(24, 6, 1)
            self.s2 = nn.Conv2d(6, 24, 1)
            self.c = nn.Conv2d(24, 3, 1, bias=False)
            self.b3 = nn.BatchNorm2d(3)
            self.h = nn.Linear(3, 10)

        def forward(self, x):
            r = x
            x = F.silu(self.b1(self.a(x)))
            x = F.silu(self.b2(self.d(x)))
            z = F.adaptive_avg_pool2d(x, 1)
            x = x * T.sigmoid(self.s2(F.silu(self.s1(z))))
            x = self.b3(self.c(x)) + r
            return self.h(F.adaptive_avg_pool2d(x, (1, 1)).flatten(1))

    models["mbconv"] = (
        MBConv,
        lambda r: (r.standard_normal((4, 3, 15, 17)).astype("f4"), r.integers(0, 10, 4)),
        lambda m, x, y: F.cross_entropy(m(x), y),
    )

    class WaveNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.i = nn.Embedding(32, 16)
            self.f = nn.ModuleList([nn.Conv1d(16, 32, 2, dilation=2**k) for k in range(4)])
            self.o = nn.ModuleList([nn.Conv1d(16, 16, 1) for k in range(4)])
            self.h = nn.Conv1d(16, 32, 1)

        def forward(self, x):
            h = self.i(x).transpose(1, 2)
            skip = 0
            for k, (f, o) in enumerate(zip(self.f, self.o)):
                z = f(F.pad(h, (2**k, 0)))
                a, b = z.chunk(2, 1)
                z = o(T.tanh(a) * T.sigmoid(b))
                skip = skip + z
                h = h + z
            return self.h(F.relu(skip))

    models["wavenet"] = (
        WaveNet,
        lambda r: (r.integers(0, 32, (3, 40)),),
        lambda m, x: F.cross_entropy(m(x[:, :-1]), x[:, 1:]),
    )

    class GAN(nn.Module):
        def __init__(self):
            super().__init__()
            self.G = nn.Sequential(
                nn.ConvTranspose2d(8, 16, 4, 1, 0, bias=False),
                nn.BatchNorm2d(16),
                nn.ReLU(True),
                nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False),
                nn.BatchNorm2d(8),
                nn.ReLU(True),
                nn.ConvTranspose2d(8, 1, 4, 2, 1),
                nn.Tanh(),
            )
            self.D = nn.Sequential(
                nn.Conv2d(1, 8, 4, 2, 1),
                nn.LeakyReLU(0.2, inplace=True),
                nn.Conv2d(8, 16, 4, 2, 1),
                nn.InstanceNorm2d(16, affine=True),
                nn.LeakyReLU(0.2),
                nn.Conv2d(16, 1, 4),
            )

    def ganloss(m, z, x, e):
        fake = m.G(z)
        f = fake.detach()
        mix = (e * x + (1 - e) * f).requires_grad_(True)
        (g,) = T.autograd.grad(m.D(mix).sum(), mix, create_graph=True)
        gp = ((g.flatten(1).norm(dim=1) - 1) ** 2).mean()
        return m.D(f).mean() - m.D(x).mean() + 10 * gp - 0.1 * m.D(fake).mean()

    models["gan"] = (
        GAN,
        lambda r: (
            r.standard_normal((5, 8, 1, 1)).astype("f4"),
            r.standard_normal((5, 1, 16, 16)).astype("f4"),
            r.random((5, 1, 1, 1)).astype("f4"),
        ),
        ganloss,
    )

    class S2S(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Embedding(20, 16)
            self.t = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True, activation="gelu")
            self.o = nn.Linear(16, 20)

        def forward(self, a, b, mask):
            n = b.shape[1]
            causal = T.triu(T.ones(n, n) * float("-inf"), diagonal=1)
            return self.o(self.t(self.e(a), self.e(b), tgt_mask=causal))

    models["s2s"] = (
        S2S,
        lambda r: (r.integers(0, 20, (3, 7)), r.integers(0, 20, (3, 6)), r.random((3, 7)) > 0.8),
        lambda m, a, b, k: F.cross_entropy(m(a, b[:, :-1], k).flatten(0, 1), b[:, 1:].flatten()),
    )

    class MoE(nn.Module):
        def __init__(self):
            super().__init__()
            self.r = nn.Linear(12, 4)
            self.x = nn.ModuleList([nn.Sequential(nn.Linear(12, 24), nn.SiLU(), nn.Linear(24, 12)) for _ in range(4)])

        def forward(self, x):
            w, i = T.topk(F.softmax(self.r(x), -1), 2)
            w = w / w.sum(-1, keepdim=True)
            out = T.zeros_like(x)
            for k, e in enumerate(self.x):
                out = out + e(x) * (w * (i == k)).sum(-1, keepdim=True)
            return out

    models["moe"] = (
        MoE,
        lambda r: (r.standard_normal((9, 12)).astype("f4"),),
        lambda m, x: F.smooth_l1_loss(m(x), x.roll(1, 0)),
    )

    class GCN(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 16)
            self.b = nn.Linear(16, 3)

        def forward(self, x, e):
            n = x.shape[0]
            deg = T.zeros(n).index_add(0, e[1], T.ones(e.shape[1])).clamp(min=1)
            h = self.a(x)
            h = T.zeros(n, 16).index_add(0, e[1], h[e[0]]) / deg.unsqueeze(1)
            h = F.elu(h)
            h = self.b(h)
            return T.zeros(n, 3).scatter_add(0, e[1].unsqueeze(1).expand(-1, 3), h[e[0]])

    models["gcn"] = (
        GCN,
        lambda r: (r.standard_normal((10, 6)).astype("f4"), r.integers(0, 10, (2, 30)), r.integers(0, 3, 10)),
        lambda m, x, e, y: F.nll_loss(F.log_softmax(m(x, e), 1), y),
    )

    class Diff(nn.Module):
        def __init__(self):
            super().__init__()
            self.t = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32))
            self.i = nn.Conv2d(1, 32, 3, padding=1)
            self.n = nn.GroupNorm(8, 32)
            self.qkv = nn.Conv2d(32, 96, 1)
            self.o = nn.Conv2d(32, 32, 1)
            self.d = nn.Conv2d(32, 32, 3, 2, 1)
            self.u = nn.Conv2d(64, 32, 3, padding=1)
            self.f = nn.Conv2d(32, 1, 3, padding=1)

        def forward(self, x, t):
            f = T.exp(-math.log(100) * T.arange(8) / 8)
            a = t[:, None] * f
            e = self.t(T.cat([a.sin(), a.cos()], -1))
            h = self.i(x) + e[:, :, None, None]
            lo = F.silu(self.d(self.n(h)))
            b, c, H, W = lo.shape
            q, k, v = self.qkv(lo).reshape(b, 3, 4, 8, H * W).transpose(-1, -2).unbind(1)
            y = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(b, c, H, W)
            lo = lo + self.o(y)
            up = F.interpolate(lo, scale_factor=2, mode="nearest")
            return self.f(F.silu(self.u(T.cat([h, up], 1))))

    models["diffusion"] = (
        Diff,
        lambda r: (r.standard_normal((3, 1, 12, 12)).astype("f4"), r.random(3).astype("f4") * 100),
        lambda m, x, t: F.mse_loss(m(x, t), x * 0.5),
    )

    class LSTMLM(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Embedding(30, 24)
            self.l = nn.LSTM(24, 24, 2, batch_first=True)
            self.o = nn.Linear(24, 30, bias=False)
            self.o.weight = self.e.weight

        def forward(self, x):
            return self.o(self.l(self.e(x))[0])

    models["lstm tied"] = (
        LSTMLM,
        lambda r: (r.integers(0, 30, (4, 9)),),
        lambda m, x: F.cross_entropy(m(x[:, :-1]).reshape(-1, 30), x[:, 1:].reshape(-1)),
    )

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Conv2d(3, 16, 4, 4)
            self.n1 = nn.LayerNorm(16)
            self.t1 = nn.Linear(16, 32)
            self.t2 = nn.Linear(32, 16)
            self.n2 = nn.LayerNorm(16)
            self.c1 = nn.Linear(16, 32)
            self.c2 = nn.Linear(32, 16)
            self.h = nn.Linear(16, 5)

        def forward(self, x):
            x = self.p(x).flatten(2).mT
            x = x + self.t2(F.gelu(self.t1(self.n1(x).mT), approximate="tanh")).mT
            x = x + self.c2(F.gelu(self.c1(self.n2(x))))
            return self.h(x.mean(1))

    models["mixer"] = (
        Mixer,
        lambda r: (r.standard_normal((4, 3, 16, 16)).astype("f4"), r.integers(0, 5, 4)),
        lambda m, x, y: F.cross_entropy(m(x), y, label_smoothing=0.1),
    )

    class PG(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Sequential(nn.Linear(4, 32), nn.Tanh())
            self.p = nn.Linear(32, 2)
            self.v = nn.Linear(32, 1)

        def forward(self, x):
            h = self.b(x)
            return self.p(h), self.v(h).squeeze(-1)

    def ppo(m, x, a, adv, ret, old):
        lg, v = m(x)
        lp = F.log_softmax(lg, -1)
        la = lp.gather(1, a[:, None]).squeeze(1)
        ratio = (la - old).exp()
        ent = -(lp.exp() * lp).sum(-1).mean()
        return -T.min(ratio * adv, ratio.clamp(0.8, 1.2) * adv).mean() + 0.5 * F.huber_loss(v, ret) - 0.01 * ent

    models["ppo"] = (
        PG,
        lambda r: (
            r.standard_normal((33, 4)).astype("f4"),
            r.integers(0, 2, 33),
            r.standard_normal(33).astype("f4"),
            r.standard_normal(33).astype("f4"),
            -r.random(33).astype("f4"),
        ),
        ppo,
    )

    class C3(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv3d(1, 8, 3, padding=1)
            self.b = nn.BatchNorm3d(8)
            self.d = nn.Conv3d(8, 8, 3, stride=2)
            self.h = nn.Linear(8, 4)

        def forward(self, x):
            x = F.max_pool3d(F.gelu(self.b(self.c(x))), 2)
            return self.h(F.softplus(self.d(x)).amax((2, 3, 4)))

    models["conv3d"] = (
        C3,
        lambda r: (r.standard_normal((2, 1, 8, 9, 10)).astype("f4"), r.integers(0, 4, 2)),
        lambda m, x, y: F.cross_entropy(m(x), y),
    )

    class Siam(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Sequential(
                nn.Conv2d(1, 8, 3, padding="same", padding_mode="reflect"),
                nn.PReLU(8),
                nn.MaxPool2d(2),
                nn.Conv2d(8, 16, 3),
                nn.Mish(),
                nn.AvgPool2d(2),
                nn.Flatten(),
                nn.Linear(64, 8),
            )

        def forward(self, a, p, n):
            a, p, n = (F.normalize(self.c(v), dim=1) for v in (a, p, n))
            return (
                F.relu(F.pairwise_distance(a, p) - F.pairwise_distance(a, n) + 1).mean()
                + (1 - F.cosine_similarity(a, p)).mean()
            )

    models["siamese"] = (
        Siam,
        lambda r: tuple(r.standard_normal((3, 1, 12, 12)).astype("f4") for _ in range(3)),
        lambda m, *v: m(*v),
    )
    return models
