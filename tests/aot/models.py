"""Models that artefacts are made of in tests, small ones."""

from __future__ import annotations

import numpy as np

import duo
from duo import nn
from tests.bench.torch_style import TorchStyle

F = nn.functional


def floats(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


def mlp() -> nn.Module:
    duo.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 70), nn.ReLU(), nn.Linear(70, 33), nn.GELU(), nn.Linear(33, 10), nn.Softmax(-1))


class Cnn(nn.Module):
    """Convolutions with batch norm, pooling and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 7 * 7, 10)

    def forward(self, x):
        x = F.relu(self.norm1(self.first(x)))
        x = F.max_pool2d(x + F.relu(self.norm2(self.second(x))), 2)
        return self.head(x.flatten(1))


def cnn() -> nn.Module:
    duo.manual_seed(1)
    model = Cnn()
    model(duo.tensor(floats(5, 6, 1, 14, 14)))  # so that the running statistics are some
    return model.eval()


class Gpt(nn.Module):
    """Four causal blocks."""

    def __init__(self, words: int = 40, width: int = 32, length: int = 12) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(duo.randn(length, width))
        layer = lambda: nn.TransformerEncoderLayer(width, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)  # noqa: E731
        self.blocks = nn.ModuleList([layer() for _ in range(4)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words)

    def forward(self, index):
        x = self.words(index) + self.places
        for block in self.blocks:
            x = block(x, is_causal=True)
        return self.head(self.norm(x))


def gpt() -> nn.Module:
    duo.manual_seed(2)
    return Gpt().eval()


class Tagger(nn.Module):
    """An LSTM over both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm = nn.Embedding(30, 12), nn.LSTM(12, 10, bidirectional=True, batch_first=True)
        self.head = nn.Linear(20, 5)

    def forward(self, index):
        return self.head(self.lstm(self.words(index))[0])


def lstm() -> nn.Module:
    duo.manual_seed(3)
    return Tagger().eval()


def resnet() -> nn.Module:
    """ResNet-18 with all its channels, for images of any number; smaller ones than it is for."""
    return TorchStyle(duo, duo.get_num_threads()).resnet_model()


# name -> what makes a model, the spec of its input, an input for a batch
MODELS = {
    "mlp": (mlp, "f32[batch,20]", lambda b: floats(b, b, 20)),
    "cnn": (cnn, "f32[batch,1,14,14]", lambda b: floats(b, b, 1, 14, 14)),
    "lstm": (lstm, "i64[batch,6]", lambda b: np.random.default_rng(b).integers(0, 30, (b, 6))),
    "gpt": (gpt, "i64[batch,12]", lambda b: np.random.default_rng(b).integers(0, 40, (b, 12))),
    "resnet": (resnet, "f32[batch,3,32,32]", lambda b: floats(b, b, 3, 32, 32)),
}
