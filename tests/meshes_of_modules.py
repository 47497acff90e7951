"""Runs in a process of its own with 8 CPU devices: attention modules cut by `partition_specs` against one device."""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from collectives import collectives
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import close, mesh_of, normal

import mqa_jax
from mqa_jax import nnx as mqa_nnx

KINDS = AxisType.Auto, AxisType.Explicit
NAMES = "data", "model"
X = normal(4, 12, 32)
KEY = jax.random.key(0)
# With whether the mesh axis cuts key/value heads: it has 4 devices.
SETTINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "norms, sinks, dropout": (dict(kv_heads=4, qk_ln=True, sinks=True, rope=mqa_jax.Rope(), attn_pdrop=0.3), True),
    "learned key and value": (dict(kv_heads=4, qk_gn=True, add_bias_kv=True, alibi=True), True),
    "fewer key/value heads": (dict(kv_heads=2, qk_ln=True, add_bias_kv=True, add_zero_attn=True), False),
    "no output projection": (dict(kv_heads=4, output_projection=False), True),
}


def placed(tree, specs, mesh):
    return jax.device_put(tree, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))


def shuffled(params):
    """Biases that are not 0, scales that are not 1."""
    return jax.tree.map(lambda x: x + normal(*x.shape) / 8, params)


def run_linen(module):
    def loss(params, x):
        out = module.apply({"params": params}, x, deterministic=False, rngs={"dropout": KEY})[0]
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def linen_against_one_device(settings=SETTINGS, embeds=(None, "data")):
    """Megatron's tensor parallelism, with kernels cut over the data axis as well; gradients have their types."""
    for name in settings:
        chosen, cuts_keys = SETTINGS[name]
        module = mqa_jax.GroupedQueryAttention(32, 8, **chosen)
        params = shuffled(module.init(KEY, X, deterministic=True)["params"])
        expected = run_linen(module)(params, X)
        for embed, kind in itertools.product(embeds, KINDS):
            mesh = mesh_of((2, 4), NAMES, kind)
            keys = "model" if cuts_keys else None
            specs = mqa_jax.partition_specs(params, heads="model", kv_heads=keys, embed=embed)
            with jax.set_mesh(mesh):
                cut = placed(params, specs, mesh)
                actual = run_linen(module)(cut, placed(X, P("data"), mesh))
            close(actual, expected, f"{name}, {kind}, {embed=}")
            if kind == AxisType.Explicit:
                for x, gradient in zip(jax.tree.leaves(cut), jax.tree.leaves(actual[1][0]), strict=True):
                    assert jax.typeof(x).sharding.spec == jax.typeof(gradient).sharding.spec


def nnx_against_one_device():
    """The same parameters in NNX, whose state has specs of its own."""
    model = mqa_nnx.GroupedQueryAttention(32, 8, kv_heads=4, qk_ln=True, sinks=True, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    state = shuffled(state)

    @jax.jit
    def run(state, x):
        def loss(state, x):
            out = nnx.merge(graph, state)(x)[0]
            return jnp.sum(jnp.sin(out)), out

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, x)

    expected = run(state, X)
    specs = mqa_jax.partition_specs(state, heads="model", kv_heads="model", embed="data")
    for kind in KINDS:
        mesh = mesh_of((2, 4), NAMES, kind)
        with jax.set_mesh(mesh):
            close(run(placed(state, specs, mesh), placed(X, P("data"), mesh)), expected, f"{kind}")


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + mqa_jax.GroupedQueryAttention(32, 8, kv_heads=4)(x)[0], None


def stack():
    """Two layers in `nn.scan` and `nn.remat`, and their parameters."""
    layers = nn.scan(
        nn.remat(Layer, prevent_cse=False),
        variable_axes={"params": 0, "cache": 0},
        split_rngs={"params": True},
        length=2,
    )()
    return layers, layers.init(KEY, X, None)["params"]


def sent_by_layers():
    """Bytes of each message of 2 layers in a loop; with `embed` kernels travel, and the bias of `out`."""
    layers, params = stack()
    function = lambda params, x: layers.apply({"params": params}, x, None)[0]
    gradients = jax.grad(lambda params, x: jnp.sum(function(params, x) ** 2), argnums=(0, 1))
    tokens = X.nbytes // 2  # those of a device
    for embed, kind in itertools.product((None, "data"), KINDS):
        mesh = mesh_of((2, 4), NAMES, kind)
        specs = mqa_jax.partition_specs(params, heads="model", kv_heads="model", embed=embed)
        with jax.set_mesh(mesh):
            mine = placed(params, specs, mesh), placed(X, P("data"), mesh)
            shardings = jax.tree.map(lambda x: x.sharding, mine)
            programs = jax.jit(function, out_shardings=shardings[1]), jax.jit(gradients, out_shardings=shardings)
            found = tuple(collectives(program.lower(*mine).compile()) for program in programs)
        layer = jax.tree.map(lambda x: x[0].nbytes // (4 if x.ndim > 2 else 1), next(iter(params.values())))
        kernels = [part["kernel"] for part in layer.values()]
        sums, all_gradients = [tokens], sum(jax.tree.leaves(layer))
        expected = {"all-reduce": sums}, {"all-reduce": sorted([*sums, 3 * tokens, all_gradients])}
        if embed:
            gathered = [*kernels, layer["out"]["bias"]]
            expected[0]["all-gather"], expected[1]["all-gather"] = sorted(gathered), sorted(gathered + kernels)
        assert found == expected, f"{embed=}, {kind}: {found}"


def fewer_key_value_heads_send_nothing_more():
    """In the forward pass: each device computes the only key/value head that it reads."""
    layer = mqa_jax.GroupedQueryAttention(32, 8, kv_heads=2)
    params = layer.init(KEY, X)["params"]
    mesh = mesh_of((2, 4), NAMES)
    with jax.set_mesh(mesh):
        cut = placed(params, mqa_jax.partition_specs(params, heads="model"), mesh), placed(X, P("data"), mesh)
        program = jax.jit(lambda params, x: layer.apply({"params": params}, x)[0]).lower(*cut).compile()
    assert collectives(program) == {"all-reduce": [X.nbytes // 2]}


def decoding():
    """A prompt and a token in scanned layers with caches of batch and heads, and, on Auto axes, of the sequence."""
    layers, params = stack()

    @jax.jit
    def step(params, cache, x):
        (out, _), state = layers.apply({"params": params, "cache": cache}, x, None, mutable=["cache"])
        return out, state["cache"]

    def both(params, cache, x):
        prompt, cache = step(params, cache, x[:, :11])
        return prompt, *step(params, cache, x[:, 11:])

    cache = mqa_jax.init_cache(layers, 4, 16, X, None)
    expected = both(params, cache, X)
    for kind, axes in [
        *itertools.product(KINDS, [dict(batch="data", kv_heads="model")]),
        (AxisType.Auto, dict(batch="data", sequence="model")),
    ]:
        mesh = mesh_of((2, 4), NAMES, kind)
        with jax.set_mesh(mesh):
            cut = placed(params, mqa_jax.partition_specs(params, heads="model", kv_heads=axes.get("kv_heads")), mesh)
            mine, x = placed(cache, mqa_jax.partition_specs(cache, **axes), mesh), placed(X, P("data"), mesh)
            actual = both(cut, mine, x)
            if "sequence" not in axes:
                assert collectives(step.lower(cut, mine, x[:, :1]).compile()) == {"all-reduce": [X[:, :1].nbytes // 2]}
        close(actual, expected, f"{kind}, {axes}")


def caches_on_explicit_axes():
    """Biases for all positions; prompts for which a ring buffer has no room, and room; rows go to other devices."""
    for layout, shape in (("static", (8, 24, 24)), ("ring", (24, 24)), ("ring", (4, 8, 24, 24))):
        bias = normal(*shape)
        layer = mqa_jax.GroupedQueryAttention(32, 8, kv_heads=4, local_window_size=(3, 0), cache_layout=layout)
        params, cache = layer.init(KEY, X)["params"], layer.init_cache(4, 24)

        @jax.jit
        def steps(params, cache, x, bias, layer=layer):
            outputs: list[Any] = []
            for start, stop in ((0, 20), (20, 22), (22, 23)):
                variables = {"params": params, "cache": cache}
                (out, *_), state = layer.apply(variables, x[:, start:stop], bias=bias, mutable=["cache"])
                outputs, cache = [*outputs, out], mqa_jax.reorder_cache(state["cache"], jnp.array([2, 0, 3, 1]))
            return outputs

        x = normal(4, 23, 32)
        expected = steps(params, cache, x, bias)
        mesh = mesh_of((2, 4), NAMES, AxisType.Explicit)
        with jax.set_mesh(mesh):
            specs = mqa_jax.partition_specs(cache, batch="data", kv_heads="model")
            mine = placed(params, mqa_jax.partition_specs(params, heads="model", kv_heads="model"), mesh)
            actual = steps(mine, placed(cache, specs, mesh), placed(x, P("data"), mesh), placed(bias, P(), mesh))
        close(actual, expected, f"{layout}, {shape}")
