"""Cross-entropy of a language-model head that never holds the logits of a whole batch.

Letters: B batch, T time, D embed, V vocab, C chunk of tokens.

``reference``  all logits at once: the definition.
``chunked``    C tokens at a time. If a gradient is needed, it is computed in the same pass: once a chunk's logits are
               available, softmax - onehot is nearly free, so the loss, dx and dW take three products of size C x D x V
               instead of the four that recomputation needs. Memory: C x V logits, dx like x, and one float32 dW.

On a mesh the chunks are local to each device: rows are sharded over (data, fsdp), tokens over `context`, and the
vocabulary over `tensor` (the logsumexp is combined over it). Under automatic partitioning, chunking a sharded T would
all-gather it; an explicit shard_map rules that out.

All arithmetic on logits is float32. The result is a weighted sum, not a mean, so that the caller can divide by the
tokens of the global batch.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lcx.errors import UserError
from lcx.ops.product import laid_out_transpose, narrow_products, wide
from lcx.ops.tiling import factor

CHUNK_LOGITS = 1 << 23  # of one chunk, 32 MiB of float32; more with a large vocabulary (chunk_tokens)
CHUNK_TOKENS = 1024  # the most tokens for which it may be more


class LogitTransform(NamedTuple):
    """Computes logits from the products x head^T: a multiplier, then, if c is set, c tanh(logits / c) (Gemma 2)."""

    multiplier: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Float[Array, "..."]) -> Float[Array, "..."]:
        if self.multiplier != 1:
            logits = logits * self.multiplier
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)

    def backward(self, logits: Float[Array, "..."], d: Float[Array, "..."]) -> Float[Array, "..."]:
        """The gradient with respect to the products, from the resulting logits and their gradient d."""
        if self.softcap is not None:
            d = d * (1 - jnp.square(logits / self.softcap))
        return d if self.multiplier == 1 else d * self.multiplier


UNCHANGED = LogitTransform()


def cross_entropy(
    x: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    labels: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    transform: LogitTransform = UNCHANGED,
    implementation: str | None = None,
) -> Float[Array, ""]:
    """Sum over tokens of weights * -log softmax(transform(x head^T))[label], float32. Differentiable in x and head."""
    if implementation == "reference":
        return jnp.sum(weights * reference(x, head, labels, transform))
    if implementation not in (None, "chunked"):
        raise UserError(f"cross_entropy implementation {implementation!r}: expected 'reference' or 'chunked'")
    return _chunked(x, head, labels, weights, transform)


def token_nll(
    x: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    labels: Int[Array, "B T"],
    *,
    transform: LogitTransform = UNCHANGED,
) -> Float[Array, "B T"]:
    """-log softmax(transform(x head^T))[label] per token, float32, chunked. For evaluation: not differentiable."""
    return _over_mesh(_local_nll, transform, out="tokens")(x, head, labels)


def reference(x: Array, head: Array, labels: Array, transform: LogitTransform = UNCHANGED) -> Array:
    logits = transform(jnp.einsum("btd,vd->btv", x.astype(jnp.float32), head.astype(jnp.float32)))
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(x, head, labels, weights, transform):
    return jnp.sum(weights * token_nll(x, head, labels, transform=transform))


def _chunked_forward(x, head, labels, weights, transform):
    run = _over_mesh(_local_loss_and_gradients, transform, out="gradients")
    loss, dx, dhead = run(x, head, labels, weights)
    return jnp.sum(loss), (dx, dhead)


def _chunked_backward(transform, residuals, g):
    dx, dhead = residuals
    return (g * dx).astype(dx.dtype), (g * dhead).astype(dhead.dtype), None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _over_mesh(fn, transform: LogitTransform, *, out: str):
    """Wraps fn so that each device runs it on its own tokens and vocabulary shard; without a mesh, fn itself."""
    fn = functools.partial(fn, transform=transform)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return functools.partial(fn, vocab_axis=None, token_axes=())
    token_axes = ("data", "fsdp", "context")
    tokens = P(("data", "fsdp"), "context")

    def wrapped(x, head, *rest):
        vocab_axis = (
            "tensor" if mesh.shape["tensor"] > 1 and head.shape[0] % mesh.shape["tensor"] == 0 else None
        )
        vocab = P(vocab_axis, None)
        outs = {"tokens": tokens, "gradients": (P(token_axes), P(*tokens, None), vocab)}[out]
        local = functools.partial(fn, vocab_axis=vocab_axis, token_axes=token_axes)
        in_specs = (P(*tokens, None), vocab, *(tokens for _ in rest))
        T, parts = x.shape[1], mesh.shape["context"]
        whole = -(-T // parts) * parts
        arrays = _resized(x, whole), head, *(_resized(a, whole) for a in rest)
        found = jax.shard_map(local, in_specs=in_specs, out_specs=outs, check_vma=False)(*arrays)
        if out == "tokens":
            return _resized(found, T)
        loss, dx, dhead = found
        return loss, _resized(dx, T), dhead

    return wrapped


def chunk_tokens(tokens: int, vocab: int, dim: int) -> int:
    """How many of `tokens` tokens have their logits in memory at a time, for a head of [vocab, dim].

    Every chunk reads the head and adds to its gradient, so chunks of few tokens are bound by memory bandwidth: with a
    vocabulary of 128,256, CHUNK_LOGITS are those of 65 tokens. So a chunk may also have half as many logits as the head
    has weights.
    """
    return max(1, min(tokens, max(CHUNK_LOGITS // vocab, min(CHUNK_TOKENS, dim // 2))))


def _resized(x: Array, T: int) -> Array:
    """[B, S, ...] with the second axis cut to T, or padded with zeros: weight 0 and the valid label 0."""
    return jnp.pad(x, ((0, 0), (0, max(T - x.shape[1], 0)), *((0, 0),) * (x.ndim - 2)))[:, :T]


def _chunks(arrays: tuple[Array, ...], head: Array) -> tuple[Array, ...]:
    """[B, T, ...] -> [number of chunks, C, ...], padded with zeros: padding has weight 0 and the valid label 0.

    Padding copies what is padded, so chunks of nearly the largest size that need none are preferred.
    """
    tokens = arrays[0].shape[0] * arrays[0].shape[1]
    most = chunk_tokens(tokens, *head.shape)
    size = next((size for size in range(most, most // 2, -1) if tokens % size == 0), most)
    count = -(-tokens // size)
    flat = (a.reshape(tokens, *a.shape[2:]) for a in arrays)
    padded = (jnp.pad(a, [(0, count * size - tokens)] + [(0, 0)] * (a.ndim - 1)) for a in flat)
    return tuple(a.reshape(count, size, *a.shape[1:]) for a in padded)


def _unchunk(x: Array, shape: tuple[int, ...]) -> Array:
    tokens = shape[0] * shape[1]
    return x.reshape(-1, *x.shape[2:])[:tokens].reshape(shape)


def _chunk_nll(x, head, labels, vocab_axis, transform):
    """One chunk: nll [C], and the residuals of the gradient: local logits [C, V], logsumexp [C], local label index."""
    factors = factor(x), factor(head.astype(x.dtype))
    logits = jnp.einsum("cd,vd->cv", *factors, preferred_element_type=jnp.float32)
    logits = transform(logits)
    if vocab_axis is not None:
        labels = labels - jax.lax.axis_index(vocab_axis) * head.shape[0]
    top = jnp.max(logits, axis=-1)
    if vocab_axis is not None:
        top = jax.lax.pmax(top, vocab_axis)
    total = jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)
    here = (labels >= 0) & (labels < head.shape[0])
    safe = jnp.where(here, labels, 0)
    picked = jnp.where(here, jnp.take_along_axis(logits, safe[:, None], axis=-1)[:, 0], 0)
    if vocab_axis is not None:
        total, picked = jax.lax.psum((total, picked), vocab_axis)
    lse = top + jnp.log(total)
    return lse - picked, logits, lse, jnp.where(here, labels, -1)


def _local_nll(x, head, labels, *, vocab_axis, token_axes, transform):
    nll = jax.lax.map(
        lambda c: _chunk_nll(c[0], head, c[1], vocab_axis, transform)[0], _chunks((x, labels), head)
    )
    return _unchunk(nll, labels.shape)


def _local_loss_and_gradients(x, head, labels, weights, *, vocab_axis, token_axes, transform):
    by_columns = narrow_products(x)  # then dW is summed as [D, V], so that all products are fast (product.py)
    chunks = _chunks((x, labels, weights), head)
    left = laid_out_transpose(chunks[0]) if by_columns else chunks[0]

    def step(carry, chunk):
        loss, dhead = carry
        (x, labels, weights), left = chunk
        nll, logits, lse, labels = _chunk_nll(x, head, labels, vocab_axis, transform)
        hot = jnp.arange(head.shape[0])[None] == labels[:, None]
        d = (jnp.exp(logits - lse[:, None]) - hot) * weights[:, None]
        d = transform.backward(logits, d).astype(x.dtype)
        widened = factor(d)
        dx = jnp.einsum("cv,vd->cd", widened, factor(head.astype(x.dtype)), preferred_element_type=jnp.float32)
        if by_columns:
            dhead += wide(left, d, 0)
        else:
            dhead += jnp.einsum("cv,cd->vd", widened, factor(x), preferred_element_type=jnp.float32)
        return (loss + jnp.sum(weights * nll), dhead), dx.astype(x.dtype)

    start = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape[::-1] if by_columns else head.shape, jnp.float32))
    (loss, dhead), dx = jax.lax.scan(step, start, (chunks, left))
    dhead = dhead.T if by_columns else dhead
    dx = _unchunk(dx, x.shape)
    if vocab_axis is not None:
        dx = jax.lax.psum(dx.astype(jnp.float32), vocab_axis).astype(x.dtype)
    if token_axes:
        dhead = jax.lax.psum(dhead, token_axes)
    return loss[None], dx, dhead.astype(head.dtype)
