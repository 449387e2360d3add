"""Reimplement the original's architectures as plain float64 PyTorch modules, written from the maths.

Parameter names and shapes are those of a state-spaces checkpoint. Full sequences only: no cache, no padding.
`test_variants.py` checks these modules against transformers where it has the same layers.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class Norm(nn.Module):
    def __init__(self, width: int, groups: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.groups = groups

    def forward(self, x):
        grouped = x.unflatten(-1, (self.groups, -1))
        return (grouped / (grouped.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * self.weight


def conv(channels: int, taps: int, bias: bool) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, taps, groups=channels, bias=bias)


def causal(layer: nn.Conv1d, x):
    """Apply a causal convolution to `(b, l, channels)`, with zeros before the first token."""
    return layer(F.pad(x.mT, (layer.kernel_size[0] - 1, 0))).mT


class Mamba2(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, c = config, config
        inner, gn = c.expand * c.hidden_size, c.n_groups * c.state_size
        self.around = inner - c.d_ssm
        self.rows = [self.around, self.around, c.d_ssm, c.d_ssm + 2 * gn, c.num_heads]
        self.in_proj = nn.Linear(c.hidden_size, sum(self.rows), bias=c.use_bias)
        self.conv1d = conv(c.d_ssm + 2 * gn, c.conv_kernel, c.use_conv_bias)
        self.dt_bias = nn.Parameter(torch.zeros(c.num_heads))
        self.A_log = nn.Parameter(torch.zeros(c.num_heads))
        self.D = nn.Parameter(torch.zeros(c.d_ssm if c.D_has_hdim else c.num_heads))
        if c.rmsnorm:
            self.norm = Norm(c.d_ssm, c.n_groups)
        self.out_proj = nn.Linear(inner, c.hidden_size, bias=c.use_bias)

    def forward(self, u):
        c = self.config
        z0, x0, z, xBC, dt = self.in_proj(u).split(self.rows, dim=-1)
        gn = c.n_groups * c.state_size
        x, B, C = F.silu(causal(self.conv1d, xBC)).split([c.d_ssm, gn, gn], dim=-1)
        dt = F.softplus(dt + self.dt_bias).clamp(*c.time_step_limit)
        x = x.unflatten(-1, (c.num_heads, c.head_dim))
        per_group = c.num_heads // c.n_groups
        B, C = (
            m.unflatten(-1, (c.n_groups, c.state_size)).repeat_interleave(per_group, dim=2) for m in (B, C)
        )
        y = self.scan(x, dt, B, C) + x * self.D.reshape(c.num_heads, -1)
        y = y.flatten(-2)
        if not c.rmsnorm:
            y = y * F.silu(z)
        elif c.norm_before_gate:
            y = self.norm(y) * F.silu(z)
        else:
            y = self.norm(y * F.silu(z))
        return self.out_proj(torch.cat([F.silu(z0) * x0, y], dim=-1))

    def scan(self, x, dt, B, C):
        """Compute the scan in its quadratic form, with a matrix of decays over all pairs of tokens."""
        steps = (dt * -self.A_log.exp()).cumsum(1)  # (b, l, h)
        decay = steps[:, :, None] - steps[:, None]  # (b, t, s, h)
        before = torch.ones(decay.shape[1:3]).tril().bool()[None, :, :, None]
        decay = decay.masked_fill(~before, -torch.inf).exp()
        return torch.einsum("bthn,bshn,btsh,bsh,bshp->bthp", C, B, decay, dt, x)


def rotate(x, width: int, base: float, interleaved: bool):
    """Apply a rotary embedding to the first `width` channels of `(b, l, h, p)`, as complex numbers."""
    places = torch.arange(x.shape[1], dtype=x.dtype)
    angles = torch.outer(places, base ** (-torch.arange(0, width, 2, dtype=x.dtype) / width))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # (l, 1, width / 2)
    pairs = x[..., :width].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    pairs = pairs if interleaved else pairs.mT
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    turned = (turned if interleaved else turned.mT).flatten(-2)
    return torch.cat([turned, x[..., width:]], dim=-1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.cfg = c = config.attn_cfg
        width, heads = config.hidden_size, [c.num_heads, c.num_heads_kv, c.num_heads_kv]
        self.rows = [count * c.head_dim for count in heads]
        self.mlp = math.ceil(c.mlp_dim / 256) * 256
        self.in_proj = nn.Linear(width, sum(self.rows) + self.mlp, bias=c.qkv_proj_bias)
        if c.d_conv:
            self.conv1d = conv(sum(self.rows), c.d_conv, bias=True)
        self.out_proj = nn.Linear(self.rows[0] + self.mlp // 2, width, bias=c.out_proj_bias)

    def forward(self, u):
        c = self.cfg
        qkv, up, gate = self.in_proj(u).split([sum(self.rows), self.mlp // 2, self.mlp // 2], dim=-1)
        if c.d_conv:
            qkv = causal(self.conv1d, qkv)
        q, k, v = (x.unflatten(-1, (-1, c.head_dim)) for x in qkv.split(self.rows, dim=-1))
        if c.rotary_emb_dim:
            q, k = (rotate(x, c.rotary_emb_dim, c.rotary_emb_base, c.rotary_emb_interleaved) for x in (q, k))
        k, v = (x.repeat_interleave(c.num_heads // c.num_heads_kv, dim=2) for x in (k, v))
        scores = torch.einsum("bthp,bshp->bhts", q, k) * (c.softmax_scale or c.head_dim**-0.5)
        before = torch.ones(scores.shape[-2:]).tril().bool()
        weights = scores.masked_fill(~before, -torch.inf).softmax(-1)
        y = torch.einsum("bhts,bshp->bthp", weights, v).flatten(-2)
        return self.out_proj(torch.cat([y, up * F.silu(gate)], dim=-1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = math.ceil(config.d_intermediate / 128) * 128
        self.fc1 = nn.Linear(config.hidden_size, 2 * width, bias=False)
        self.fc2 = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x):
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * F.silu(gate))


class Block(nn.Module):
    def __init__(self, config, index: int):
        super().__init__()
        self.norm = Norm(config.hidden_size)
        self.mixer = Attention(config) if index in config.attn_layer_idx else Mamba2(config)
        if config.d_intermediate:
            self.norm2, self.mlp = Norm(config.hidden_size), MLP(config)

    def forward(self, x):
        x = x + self.mixer(self.norm(x))
        return x + self.mlp(self.norm2(x)) if hasattr(self, "mlp") else x


class Original(nn.Module):
    """A language model of the original, with all parameters random, in float64."""

    def __init__(self, config):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.backbone.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.backbone.norm_f = Norm(config.hidden_size)
        self.tied = config.tie_word_embeddings
        if not self.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                # drawn in float32, the dtype of the checkpoint file
                drawn = torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.5)
                parameter.copy_(drawn + (1 if parameter.ndim == 1 else 0))
        self.double()

    def forward(self, ids):
        x = self.backbone.embedding(ids)
        for layer in self.backbone.layers:
            x = layer(x)
        x = self.backbone.norm_f(x)
        return x @ self.backbone.embedding.weight.T if self.tied else self.lm_head(x)
