"""Model parallelism by names: each parameter axis has a logical name, and one table says which mesh axes carry it.

The mesh is chosen in the script, the names live beside the model (`LanguageModel.axes`), and XLA inserts the
communication (GSPMD, arXiv 2105.04663). Axes that a mesh lacks or that do not divide are replicated.
"""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Logical axis -> mesh axes that carry it, in order. "fsdp" splits parameters and batch, "tensor" the work of a layer.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "head_dim": (),
    "norm": (),
    "layers": (),
}


def make_mesh(shape: dict[str, int], devices=None) -> Mesh:
    """A mesh with named axes, such as `{"data": 2, "fsdp": 2, "tensor": 2}`.

    Args:
      shape: axis name -> size; at most one size may be -1, for all the devices that the others leave.
      devices: the devices to use; None for the first ones of `jax.devices()`.
    Raises:
      ValueError: more than one -1, a size below 1, or more devices asked for than there are.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = list(shape.values())
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"shape must hold positive sizes and at most one -1, got {shape}")
    fixed = 1
    for size in sizes:
        fixed *= 1 if size == -1 else size
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    needed = fixed * (len(devices) // fixed if -1 in shape.values() else 1)
    if needed > len(devices) or needed < 1:
        raise ValueError(f"shape {shape} does not fit on {len(devices)} devices")
    # Auto axes: shardings are propagated by the compiler; make_mesh would otherwise make them Explicit.
    return jax.make_mesh(sizes, tuple(shape), axis_types=(AxisType.Auto,) * len(sizes), devices=devices[:needed])


def partition_spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, rules=None) -> PartitionSpec:
    """The mesh axes of one array.

    Args:
      names: a logical name (or None: replicated) for each axis.
      shape: the array's shape; an axis that its mesh axes do not divide is replicated.
      rules: see `RULES`, the default.
    Raises:
      ValueError: another number of names than axes, or a name without a rule.
    """
    rules = RULES if rules is None else rules
    if len(names) != len(shape):
        raise ValueError(f"names must have one entry an axis, got {names} for shape {shape}")
    used: set[str] = set()
    spec = []
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in rules:
            raise ValueError(f"no sharding rule for logical axis {name!r}, known are {sorted(rules)}")
        carriers, ways = [], 1
        for axis in rules[name] if name is not None else ():
            # A mesh axis can carry one axis of an array, and only evenly.
            if axis in mesh.shape and axis not in used and size % (ways * mesh.shape[axis]) == 0:
                carriers.append(axis)
                ways *= mesh.shape[axis]
        used.update(carriers)
        spec.append(None if not carriers else carriers[0] if len(carriers) == 1 else tuple(carriers))
    return PartitionSpec(*spec)


def named_shardings(axes: Any, shapes: Any, mesh: Mesh, rules=None) -> Any:
    """A tree of NamedSharding like `shapes` (arrays or ShapeDtypeStructs), from the tree of logical names `axes`."""
    return jax.tree.map(
        lambda leaf, names: NamedSharding(mesh, partition_spec(names, leaf.shape, mesh, rules)), shapes, axes
    )


def batch_sharding(mesh: Mesh, batch: int, rules=None) -> NamedSharding:
    """The sharding of arrays `[B, ...]` over the axes that carry the batch; replicated where they do not divide it."""
    return NamedSharding(mesh, partition_spec(("batch",), (batch,), mesh, rules))


def state_shardings(state: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings of an optimiser state that follow its parameters.

    A leaf of the state whose path ends with the path of a parameter of the same shape (Adam's moments, a momentum, an
    average of the weights, masked or not) lies where that parameter lies; everything else is replicated.

    Args:
      state: the state, or its shapes from `jax.eval_shape(optimizer.init, params)`.
      params, shardings: the parameters (or shapes) and their shardings, from `named_shardings`.
    """
    places = dict(jax.tree_util.tree_flatten_with_path(shardings)[0])
    sizes = {path: leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}

    def place(path, leaf):
        tails = (path[i:] for i in range(len(path) + 1))
        owner = next((tail for tail in tails if sizes.get(tail) == leaf.shape), None)
        return NamedSharding(mesh, PartitionSpec()) if owner is None else places[owner]

    return jax.tree_util.tree_map_with_path(place, state)
