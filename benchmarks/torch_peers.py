"""The operators in other libraries, with torch: benchmarks/kernels.py runs this in a separate process.

It reads and writes one line of JSON per request:

    {"check": operator, "inputs": FILE.npz, "outputs": FOLDER} -> {peer: FOLDER/peer.npy, or why not}
    {"prepare": operator, "size": {...}, "shapes": {...}, "dtype": ..., "train": ...,
     "without": [peers]} -> {peer that runs here: seconds of the first call}
    {"run": peer, "calls": n} -> seconds
    {"threads": true} -> the threads that torch uses

On an NVIDIA GPU flash-linear-attention's Triton kernels and power retention where they can be imported, everywhere
what torch itself has.
"""

import json
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def gated(a, y):
    return (a["x1"] * y).to(a["v"].dtype)


def torch_short_conv(a):
    x, w = a["x"], a["w"]
    K = w.shape[1]
    return F.conv1d(F.pad(x, (K - 1, 0)), w.flip(1)[:, None].to(x.dtype), groups=x.shape[1])


def fla_short_conv(a):
    from fla.modules.causal_conv1d import causal_conv1d

    # Time before channels, its own layout; taps in correlation order.
    return causal_conv1d(a["x_bt"], a["w_flipped"])[0].transpose(1, 2)


def torch_fir_conv(a):
    g, h = a["x2"] * a["v"], a["h"]
    D, K = g.shape[1], h.shape[1]
    w = h.flip(1).repeat_interleave(D // h.shape[0], dim=0)[:, None].to(g.dtype)
    return gated(a, F.conv1d(F.pad(g, (K - 1, 0)), w, groups=D))


def torch_fft(a):
    g, T = (a["x2"] * a["v"]).float(), a["v"].shape[2]
    y = torch.fft.irfft(torch.fft.rfft(g, 2 * T) * torch.fft.rfft(a["h"], 2 * T), 2 * T)[..., :T]
    return gated(a, y + a["skip"][:, None] * g)


def fla_linear_attention(a):
    from fla.ops.linear_attn import chunk_linear_attn

    return chunk_linear_attn(a["q"], a["k"], a["v"], scale=1.0, normalize=True)[0]


def fla_simple_gla(a):
    from fla.ops.simple_gla import chunk_simple_gla

    N = a["v"].shape[2]
    q, k = (x.expand(-1, -1, N, -1).contiguous() if x.shape[2] == 1 else x for x in (a["q"], a["k"]))
    return chunk_simple_gla(q, k, a["v"], g=a["log_decay"], scale=1.0)[0]


def power_retention(a):
    from retention import power_retention

    return power_retention(a["q"], a["k"], a["v"], log_G=a["log_decay"], deg=2, chunk_size=1024)


def sdpa(a):
    q, k, v = (a[name].transpose(1, 2) for name in "qkv")
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def cross_entropy(a):
    logits = a["x"].flatten(0, 1) @ a["head"].T
    return F.cross_entropy(logits.float(), a["labels"].flatten().long(), reduction="sum")


ANYWHERE = {
    "short_conv": {"torch conv1d": torch_short_conv},
    "fir_conv_7": {"torch conv1d": torch_fir_conv},
    "fir_conv_128": {"torch conv1d": torch_fir_conv},
    "long_conv": {"torch fft": torch_fft},
    "attention": {"torch sdpa": sdpa},
    "cross_entropy": {"torch": cross_entropy},
}
ON_CUDA = {
    "short_conv": {"fla causal_conv1d": fla_short_conv},
    "linear_attention": {"fla chunk_linear_attn": fla_linear_attention},
    "ssd": {"fla chunk_simple_gla": fla_simple_gla},
    "second_order_states": {"power retention": power_retention},
    "second_order_tiles": {"power retention": power_retention},
}


def peers(operator: str) -> dict:
    return ANYWHERE.get(operator, {}) | (ON_CUDA.get(operator, {}) if CUDA else {})


def finished(arrays: dict) -> dict:
    """The arrays in the layouts that a peer expects, converted outside of the timing."""
    if "w" in arrays:
        arrays["x_bt"] = arrays["x"].transpose(1, 2).contiguous()
        arrays["w_flipped"] = arrays["w"].flip(1).to(arrays["x"].dtype).contiguous()
    return {name: x.detach().requires_grad_() if x.is_floating_point() else x for name, x in arrays.items()}


def check(request: dict) -> dict:
    with np.load(request["inputs"]) as file:
        inputs = {name: torch.from_numpy(file[name]).to(DEVICE) for name in file.files}
    floating = torch.bfloat16 if CUDA else torch.float32
    keep = {"h", "skip", "log_decay", "w"}
    arrays = {n: x.to(floating) if x.is_floating_point() and n not in keep else x for n, x in inputs.items()}
    arrays, out = finished(arrays), {}
    for number, (name, fn) in enumerate(peers(request["check"]).items()):
        try:
            path = f"{request['outputs']}/{number}.npy"
            np.save(path, fn(arrays).detach().float().cpu().numpy())
            out[name] = path
        except Exception as error:  # a peer that is not installed, or refuses the shape, is left out
            out[name] = f"{type(error).__name__}: {error}"[:200]
    return out


class Prepared:
    """The operator, inputs and peers of one point of the sweep."""

    def __init__(self, request: dict):
        dtype = getattr(torch, request["dtype"])
        arrays = {}
        for name, (shape, kind) in request["shapes"].items():
            x = torch.randn(shape, device=DEVICE)
            if kind == "labels":
                x = torch.randint(0, request["size"]["V"], shape, device=DEVICE)
            elif kind == "decay":
                x = -torch.exp(x - 3)
            elif kind == "positive":
                x = torch.softmax(x, -1)
            arrays[name] = x.to(dtype) if kind in ("x", "positive") else x
        self.arrays, self.train = finished(arrays), request["train"]
        wanted = {
            name: fn for name, fn in peers(request["prepare"]).items() if name not in request["without"]
        }
        self.peers, self.first = {}, {}
        for name, fn in wanted.items():
            self.peers[name] = fn
            try:
                self.first[name] = self.run(name, 1)
            except Exception:
                del self.peers[name]

    def call(self, fn):
        if not self.train:
            with torch.no_grad():
                return fn(self.arrays)
        y = fn(self.arrays)
        y.backward(torch.ones_like(y))
        for x in self.arrays.values():
            x.grad = None
        return y

    def run(self, name: str, calls: int) -> float:
        fn = self.peers[name]
        start = time.perf_counter()
        for _ in range(calls):
            self.call(fn)
        if CUDA:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def main() -> None:
    prepared = None
    for line in sys.stdin:
        request = json.loads(line)
        if "check" in request:
            answer = check(request)
        elif "threads" in request:
            answer = {"threads": torch.get_num_threads(), "cuda": CUDA}
        elif "prepare" in request:
            prepared = None  # frees the memory of the previous point
            prepared = Prepared(request)
            answer = prepared.first
        else:
            assert prepared is not None
            answer = prepared.run(request["run"], request["calls"])
        print("answer " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
