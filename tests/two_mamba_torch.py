"""2Mamba in torch, written from the formulas, under the published names: what a published run is imitated with."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


class Attention(nn.Module):
    """Scores squared, times decays, divided by their sum; a convolution of width 2 over q, k and v."""

    def __init__(self, hidden, heads, length):
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(hidden, 3 * hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.A_mask_proj = nn.Linear(hidden, heads, bias=False)
        self.conv1d = nn.Conv1d(3 * hidden, 3 * hidden, 2, groups=3 * hidden, padding=1)
        self.register_buffer("attn_mask", ~torch.tril(torch.ones(length, length)).bool()[None, None])

    def forward(self, x):
        B, T, D = x.shape
        qkv = self.conv1d(self.qkv_proj(x).transpose(1, 2))[..., :T].transpose(1, 2)
        q, k, v = (y.view(B, T, self.heads, -1).transpose(1, 2) for y in qkv.split(D, dim=-1))
        c = torch.cumsum(-F.softplus(self.A_mask_proj(x)), dim=1).transpose(1, 2)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).square()
        decays = (c[..., :, None] - c[..., None, :]).masked_fill(self.attn_mask[..., :T, :T], -math.inf)
        weights = scores * decays.exp()
        y = (weights @ v) / weights.sum(-1, keepdim=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, hidden, heads, inner, length):
        super().__init__()
        self.self_attn = Attention(hidden, heads, length)
        self.mlp = Mlp(hidden, inner)
        self.input_layernorm = RMSNorm(hidden)
        self.post_attention_layernorm = RMSNorm(hidden)

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, vocab, hidden, layers):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(hidden)


class Model(nn.Module):
    def __init__(self, *, vocab, hidden, heads, inner, depth, length):
        super().__init__()
        layers = [Layer(hidden, heads, inner, length) for _ in range(depth)]
        self.model = Body(vocab, hidden, layers)
        self.lm_head = nn.Linear(hidden, vocab, bias=False)

    def loss(self, batch):
        """Mean cross-entropy of a batch of tokens, labels and loss_weights, [B, T]."""
        x = self.model.embed_tokens(batch["tokens"])
        for layer in self.model.layers:
            x = layer(x)
        logits = self.lm_head(self.model.norm(x))
        losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        weights = batch["loss_weights"].flatten()
        return (losses * weights).sum() / weights.sum()


def scheduler(optimizer, warmup, total):
    """The published schedule. The trainer calls step(number of the update) after each update."""
    rest = total - warmup
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: s / warmup if s < warmup else 1 - (s - warmup) / rest
    )
