"""The transformer layer of mmFormer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class TransformerLayer(nn.Module):
    """Let every token read all others, then change each by two linear layers.

    ``x ← x + pos; x ← x + drop(attn(LN(x))); x ← x + FF(LN(x))``.

    Multi-head self-attention with a bias-free query, key and value projection; FF is linear, GELU,
    linear. Dropout after softmax, projection, attention and both linear maps.

    Args:
        width: channels C of a token.
        heads: attention heads; divides ``width``.
        hidden: hidden channels of FF.
        dropout: probability of dropping a value.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.norm_feed = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, hidden)
        self.feed_out = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Transform tokens ``[B, N, C]``; ``position`` is ``[1, N, C]``."""
        x = x + position
        x = x + self.drop(self.drop(self._attend(self.norm_attention(x))))
        hidden = self.drop(F.gelu(self.feed_in(self.norm_feed(x))))
        fed: Tensor = x + self.drop(self.feed_out(hidden))
        return fed

    def _attend(self, x: Tensor) -> Tensor:
        samples, tokens, width = x.shape
        split = self.qkv(x).view(samples, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        rate = self.drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=rate)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(x.shape))
        return out
