"""A character-level transformer that learns the Zen of Python by heart, its training step compiled as a whole.

    python examples/tiny_gpt.py [--steps N]

The text comes with Python (the module `this`). The network is a small GPT: token and position embeddings, blocks of layer norm, causal
attention and a GELU feed-forward layer, trained with AdamW.
"""

import argparse
import codecs
import contextlib
import io

import duo
import duo.nn.functional as F
from duo import nn, optim

CONTEXT = 48


def zen() -> str:
    """The Zen of Python; `this` keeps it in ROT13, and prints it when it is imported."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return codecs.decode(this.s, "rot13")


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, time, width = x.shape
        parts = self.qkv(self.norm1(x)).split(width, 2)
        q, k, v = (p.view(batch, time, self.heads, width // self.heads).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, vocabulary, width=64, heads=4, layers=2):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens):
        x = self.token(tokens) + self.position(duo.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def main(steps: int = 600) -> tuple[float, str]:
    """Trains; gives the last loss and a text that the model continues from 'Beautiful'."""
    text = zen()
    letters = sorted(set(text))
    code = {c: i for i, c in enumerate(letters)}
    data = duo.tensor([code[c] for c in text])

    duo.manual_seed(0)
    model = GPT(len(letters))
    optimizer = optim.AdamW(model.parameters(), lr=3e-3)

    @duo.compile
    def train(tokens, targets):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        return loss

    offsets = duo.arange(CONTEXT)
    loss = float("nan")
    for step in range(1, steps + 1):
        rows = duo.randint(0, len(text) - CONTEXT, (16, 1)) + offsets
        loss = train(data[rows], data[rows + 1])
        if step % 100 == 0:
            print(f"step {step:4}  loss {loss.item():.4f}")

    said = "Beautiful"
    model.eval()
    with duo.no_grad():
        for _ in range(120):
            recent = said[-CONTEXT:]
            tokens = duo.tensor([[code[c] for c in recent.ljust(CONTEXT)]])  # one length: one program
            said += letters[model(tokens)[0, len(recent) - 1].argmax().item()]
    print(said)
    return float(loss), said


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    main(parser.parse_args().steps)
