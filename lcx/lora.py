"""LoRA: a pair of trainable low-rank matrices added to a frozen projection (Hu et al. 2021, arXiv 2106.09685).

y = x W + (alpha / rank) (x a) b. The pairs form a separate Flax variable collection, at the paths of the projections
they belong to; `layers.Linear` adds a pair wherever it finds one. During training pairs are not merged into the
kernels, because that would need a product of the kernel's size and its gradient in every step. `merge` does it once,
for export.

    model.apply({"params": params, "lora": lora}, tokens)
    stages_0/block_0/mixer/q_proj:     a [L, in..., R]    b [L, R, out...]    scale [L]   (L layers of the stage)
    stages_0/block_0/mlp/gate_proj:    a [L, E, in, R]    b [L, E, R, out]    scale [L]   (of E experts)

Pairs are initialised as in PEFT: a uniform, b zero. `convert/peft/` reads and writes PEFT's files.
"""

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from lcx import mixers, sharding
from lcx import model as model_lib
from lcx.errors import UserError
from lcx.layers import Linear, of_shapes
from lcx.mlps.experts import PROJECTIONS, ExpertsMlp
from lcx.model import Decoder
from lcx.parameters import leaf_paths
from lcx.wording import counted, quantity

LEAVES = ("a", "b", "scale")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which projections get a low-rank pair, and of what rank.

    Attributes:
      rank: R, the inner dimension of a pair.
      alpha: the update is scaled by alpha / rank, so that its size does not depend on the rank.
      targets: a regular expression, searched for anywhere in a path such as "stages_0/block_0/mixer/q_proj". It
        can select every projection that is an lcx.layers.Linear, in your own mixers and MLPs too, and those of experts,
        which get a pair for each expert. The default selects every projection of every mixer: q, k, v, o of attention,
        in_proj and out_proj of Hyena, all of Mamba-2 and 2Mamba. "_proj" also selects those of the MLPs and experts.
      beside: a regular expression; parameters whose path ("params/stages_0/block_0/mixer/feature_map_q/layer") matches
        are trained in addition to the pairs. None: no others.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = r"/mixer/"
    beside: str | None = None

    def __post_init__(self):
        if not isinstance(self.rank, int) or self.rank < 1:
            raise UserError(f"LoRA.rank is {self.rank!r}, expected an integer >= 1: change LoRA.rank")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"LoRA.alpha is {self.alpha!r}, expected a positive number: change LoRA.alpha")
        for name in ("targets", "beside"):
            pattern = getattr(self, name)
            try:
                re.compile("" if name == "beside" and pattern is None else pattern)
            except (re.error, TypeError) as error:
                found = f"LoRA.{name} {pattern!r} is not a regular expression ({error})"
                raise UserError(f"{found}: change LoRA.{name}") from None

    def abstract(self, model: Decoder, *, mesh: Mesh | None = None) -> dict[str, Any]:
        """Tree of float32 ShapeDtypeStruct of all pairs; with a mesh, sharded like the kernels they belong to.

        Raises:
          UserError: targets matches no projection of the model.
        """
        tree: dict[str, Any] = {}
        for target in self._targets(model):
            into, out = target.names[: len(target.in_shape)], target.names[len(target.in_shape) :]
            stacked, stack = ("layers", *("experts" for _ in target.stack[1:])), target.stack
            pair = {
                "a": _struct((*stack, *target.in_shape, self.rank), (*stacked, *into, None), mesh),
                "b": _struct((*stack, self.rank, *target.out_shape), (*stacked, None, *out), mesh),
                "scale": _struct(stack[:1], ("layers",), mesh),
            }
            _put(tree, target.path, pair)
        return tree

    def init(self, key: Array, model: Decoder, *, mesh: Mesh | None = None) -> dict[str, Any]:
        """The `lora` collection at the start of training. b is zero, so the model's output is unchanged at first.

        a is uniform in +-1/sqrt(number of inputs), as in PEFT. The values for a projection depend only on the key and
        its path, not on which other projections have pairs.

        Raises:
          UserError: targets matches no projection of the model, or the rank exceeds the widths of all it matches.
        """
        targets = {target.path: target for target in self._targets(model)}
        widths = [target.width for target in targets.values()]
        if self.rank > max(widths):
            raise UserError(
                f"LoRA.rank is {self.rank}, more than the smaller side of every matrix that it adapts (at most "
                f"{max(widths)}): lower LoRA.rank"
            )
        abstract = self.abstract(model, mesh=mesh)

        def draw(key):
            return jax.tree_util.tree_map_with_path(
                lambda path, leaf: self._leaf(key, path, leaf, targets["/".join(k.key for k in path[:-1])]), abstract
            )

        if mesh is None:
            return jax.jit(draw)(key)
        with jax.set_mesh(mesh):
            return jax.jit(draw, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(key)

    def _leaf(self, key: Array, path: Any, leaf: jax.ShapeDtypeStruct, target: "Target") -> Array:
        name = path[-1].key
        if name == "scale":
            return jnp.full(leaf.shape, self.alpha / self.rank, leaf.dtype)
        if name == "b":
            return jnp.zeros(leaf.shape, leaf.dtype)
        bound = 1 / math.sqrt(math.prod(target.in_shape))
        key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return jax.random.uniform(key, leaf.shape, leaf.dtype, -bound, bound)

    def paths(self, model: Decoder) -> list[str]:
        """Paths of the projections that get a pair, "stages_0/block_0/mixer/q_proj". Raises UserError if none does."""
        return [target.path for target in self._targets(model)]

    def _targets(self, model: Decoder) -> "list[Target]":
        targets = all_targets(model)
        if not targets:
            raise UserError(
                "LoRA targets projections made of lcx.layers.Linear, and the model has none: build them of it in your "
                "mixers and MLPs, or leave LoRA out"
            )
        found = [target for target in targets if re.search(self.targets, target.path)]
        if not found:
            names = ", ".join(dict.fromkeys(target.path.rpartition("/")[2] for target in targets))
            raise UserError(
                f"LoRA.targets {self.targets!r} matches no projection of the model, which has {names} in paths such as "
                f"{targets[0].path}: change LoRA.targets"
            )
        return found


@dataclasses.dataclass(frozen=True)
class Target:
    """A projection that can have pairs.

    Attributes:
      stack: the axes of its kernel before those of one matrix: layers [L], or layers and experts [L, E].
      names: logical names of the axes in_shape + out_shape.
    """

    path: str
    stack: tuple[int, ...]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    names: tuple[str | None, ...]

    @property
    def width(self) -> int:
        """The smaller side of one matrix."""
        return min(math.prod(self.in_shape), math.prod(self.out_shape))


@functools.lru_cache(maxsize=16)  # tracing the model is slow
def all_targets(model: Decoder) -> tuple[Target, ...]:
    """Every projection that can have pairs, in the order of execution."""
    found, params = _projections(model)
    targets = []
    for path, module in found.items():
        if isinstance(module, Linear):
            stack, ends = _at(params, path)["kernel"].unbox().shape[:1], (module.in_shape, module.out_shape)
            targets.append(Target(path, stack, *ends, module.names))
            continue
        for name in PROJECTIONS:
            kernel = _at(params, path)[f"{name}_kernel"]
            *stack, into, out = kernel.unbox().shape
            targets.append(Target(f"{path}/{name}", tuple(stack), (into,), (out,), kernel.names[-2:]))
    return tuple(targets)


def all_linears(model: Decoder) -> Iterator[tuple[str, Linear, int]]:
    """(path, module, number of layers stacked in its kernel) of every linear projection, in order of execution."""
    found, params = _projections(model)
    for path, module in found.items():
        if isinstance(module, Linear):
            yield path, module, _at(params, path)["kernel"].unbox().shape[0]


def _projections(model: Decoder) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """(path -> module made of lcx.layers.Linear or of experts, shapes of the parameters with their names)."""
    found: dict[str, nn.Module] = {}

    def record(call, args, kwargs, context):
        if isinstance(context.module, Linear | ExpertsMlp) and context.method_name == "__call__":
            found["/".join(context.module.path)] = context.module
        return call(*args, **kwargs)

    with nn.intercept_methods(record), of_shapes():
        variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    return found, variables["params"]


def statement(model: Decoder, lora: Mapping[str, Any], trains: Any = None) -> str:
    """One line that says which matrices a `lora` collection modifies, counted per kind of layer.

    "LoRA rank 8 on 56 matrices: Attention q_proj 14, k_proj 14, v_proj 14, o_proj 14; 573 thousand parameters"

    A pair of each expert counts as one. It also names the kinds of layer that can have no pairs, since nothing in them
    is an lcx.layers.Linear.

    Args:
      model: the architecture.
      lora: the collection, or its shapes.
      trains: tree of bool like the params: which of them are trained in addition to the pairs.
    """
    counts: dict[str, dict[str, int]] = {}
    narrow: dict[str, int] = {}
    ranks, parameters = set(), 0
    kinds_of = _kinds(model)
    without = dict(kinds_of)
    for target in all_targets(model):
        owner, name = "/".join(target.path.split("/")[:3]), target.path.rpartition("/")[2]
        without.pop(owner, None)
        if (pair := _at(lora, target.path)) is None:
            continue
        names = counts.setdefault(kinds_of[owner], {})
        names[name] = names.get(name, 0) + math.prod(target.stack)
        ranks.add(pair["a"].shape[-1])
        if pair["a"].shape[-1] > target.width:
            narrow[name] = target.width
        parameters += math.prod(pair["a"].shape) + math.prod(pair["b"].shape)
    total = sum(sum(names.values()) for names in counts.values())
    kinds = [
        f"{kind} {', '.join(f'{n} {count}' for n, count in names.items())}" for kind, names in counts.items()
    ]
    rank = " and ".join(str(rank) for rank in sorted(ranks))
    where = f"{quantity(total, 'matrix', 'matrices')}: {'; '.join(kinds)}"
    line = f"LoRA rank {rank} on {where}; {quantity(counted(parameters), 'parameter')}"
    if narrow:
        sides = ", ".join(f"{name} {width}" for name, width in narrow.items())
        line += f"; the rank exceeds the smaller side of {sides}"
    if without:
        line += f"; none in {', '.join(dict.fromkeys(without.values()))}, which has no lcx.layers.Linear"
    return line if trains is None else line + _beside(model, trains)


def _kinds(model: Decoder) -> dict[str, str]:
    """ "stages_0/block_0/mixer" -> "Attention", for every mixer and MLP."""
    found = {}
    for s, stage in enumerate(model.stages):
        for b, block in enumerate(stage.pattern):
            for part, module in (("mixer", block.mixer), ("mlp", block.mlp)):
                if module is not None:
                    found[f"stages_{s}/block_{b}/{part}"] = mixers.kind(module)
    return found


def _beside(model: Decoder, trains: Any) -> str:
    shapes = model_lib.abstract_params(model)
    found = [
        (path, leaf.size)
        for path, leaf, yes in zip(
            leaf_paths(shapes), jax.tree.leaves(shapes), jax.tree.leaves(trains), strict=True
        )
        if yes
    ]
    if not found:
        return ""
    names = ", ".join(name for name, _ in found[:4]) + (
        f" and {len(found) - 4} more" if len(found) > 4 else ""
    )
    return f"; in addition {names}: {quantity(counted(sum(size for _, size in found)), 'parameter')}"


def merge(params: Mapping[str, Any], lora: Mapping[str, Any]) -> dict[str, Any]:
    """Params with scale * a @ b added to every kernel that has a pair; the model then needs no `lora` collection.

    The sum is computed in float32 and stored in the kernel's dtype. Differentiable with respect to both arguments.

    Raises:
      UserError: a pair belongs to no projection of params, or does not fit the shape of its kernel.
    """
    return _merged(params, lora, ())


def _merged(params: Mapping[str, Any], lora: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    new = dict(params)
    for name, below in lora.items():
        where, inside = (*path, name), params.get(name)
        if set(below) != set(LEAVES) and isinstance(inside, Mapping):
            new[name] = _merged(inside, below, where)
        elif isinstance(inside, Mapping) and "kernel" in inside:
            new[name] = {**inside, "kernel": _merged_kernel("/".join(where), inside["kernel"], below, 1)}
        elif f"{name}_kernel" in params:  # of experts
            kernel = params[f"{name}_kernel"]
            new[f"{name}_kernel"] = _merged_kernel("/".join(where), kernel, below, 2)
        else:
            found = f"the lora collection has {'/'.join(where)}"
            raise UserError(f"{found}, which is not a projection of these params: merge it with its own model")
    return new


def _merged_kernel(
    path: str, kernel: Float[Array, "L ..."], pair: Mapping[str, Array], stacked: int
) -> Float[Array, "L ..."]:
    """The merged kernel, whose first `stacked` axes are those of layers, or of layers and experts."""
    a, b, scale = (pair[leaf] for leaf in LEAVES)
    if kernel.shape != (*a.shape[:-1], *b.shape[stacked + 1 :]) or a.shape[-1] != b.shape[stacked]:
        found = f"the lora pair at {path} has a {a.shape} and b {b.shape}"
        raise UserError(f"{found}, which do not fit the kernel {kernel.shape}: merge it with its own model")

    def one(layer):
        kernel32, a, b, scale = (x.astype(jnp.float32) for x in layer)
        multiply = functools.partial(jnp.tensordot, axes=1, precision="highest")
        update = jax.vmap(multiply)(a, b) if stacked == 2 else multiply(a, b)
        return (kernel32 + scale * update).astype(kernel.dtype)

    # One layer at a time, because the float32 update is as large as the kernel itself.
    return jax.lax.map(one, (kernel, a, b, scale))


def _struct(shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    placed = None if mesh is None else NamedSharding(mesh, sharding.spec(names, shape, mesh))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placed)


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value


def _at(tree: Mapping[str, Any], path: str) -> Any:
    """The subtree at the path, or None if there is none."""
    for name in path.split("/"):
        if name not in tree:
            return None
        tree = tree[name]
    return tree
