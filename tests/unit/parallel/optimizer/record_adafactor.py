"""Record what optax, big_vision and T5X make of the same gradients, into adafactor.json beside this file.

Run it in an environment with jax, optax and flax, which no test needs, with the sources of both repositories (T5X
cc342d4, big_vision 0127fb6; optax 0.2.8):

    python record_adafactor.py t5x/adafactor.py big_vision/optax.py
"""

import json
import sys
import types
from pathlib import Path

import numpy as np

STEPS, RATE, MIN_DIM = 5, 1e-2, 32
# A ViT of 96 wide, 3 heads of 32, patches of 32 pixels; kernels as flax shapes them.
SHAPES = {
    "patches.embedding.weight": (32, 32, 3, 96),
    "vit_block_0.attention_in.query.weight": (96, 3, 32),
    "vit_block_0.attention_in.query.bias": (3, 32),
    "vit_block_0.attention_out.out.weight": (3, 32, 96),
    "vit_block_0.mlp_in.hidden.weight": (96, 40),
    "patches.position": (1, 49, 96),
    "classifier.value.weight": (96, 3, 32),
    "classifier.classes.weight": (96, 7),
}
# T5X has rules for the axes of its own kernels; a kernel of more than two dimensions needs one.
AXES = {"query": ("ROW", "COLUMN", "COLUMN"), "value": ("ROW", "COLUMN", "COLUMN"), "out": ("COLUMN", "COLUMN", "ROW")}


def drawn(number: int) -> dict[str, np.ndarray]:
    """Weights (0) or the gradients of a step (1, ...); scaled by row and column, or all factors would be nearly 1."""
    random = np.random.RandomState(number)
    found = {}
    for name, shape in SHAPES.items():
        values = random.standard_normal(shape)
        for axis, size in enumerate(shape):
            values *= np.exp(random.standard_normal(size)).reshape([-1 if a == axis else 1 for a in range(len(shape))])
        found[name] = values.astype(np.float32)
    return found


def sampled(values: np.ndarray) -> list[float]:
    """The norm, and 50 elements all over the tensor in flax's order."""
    flat = np.asarray(values, np.float64).ravel()
    return [float(np.linalg.norm(flat)), *flat[:: max(1, len(flat) // 50)][:50].tolist()]


def big_vision(source: str) -> dict[str, list[float]]:
    """Its `scale_by_adafactor`, without momentum, which is kept in bf16."""
    import jax
    import optax

    own = {"optax": optax, "jnp": jax.numpy}
    begin, end = source.index("def scale_by_adafactor"), source.index("optax.big_vision.scale_by_adafactor")
    exec(source[begin:end], own)
    made = own["scale_by_adafactor"](min_dim_size_to_factor=MIN_DIM, momentum=None)
    weights = drawn(0)
    state = made.init(weights)
    for step in range(STEPS):
        updates, state = made.update(drawn(1 + step), state, weights)
        weights = {name: values - RATE * updates[name] for name, values in weights.items()}
    return {name: sampled(values) for name, values in weights.items()}


def t5x(source: str) -> dict[str, list[float]]:
    """Its Adafactor with the factor rules of the axes `embed`, `heads` and `kv`; the patches' kernel has none."""
    from flax.traverse_util import flatten_dict

    for name in ("t5x", "t5x.utils", "t5x.optimizers"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["t5x"].utils = sys.modules["t5x.utils"]
    sys.modules["t5x.utils"].flatten_dict_string_keys = lambda x: flatten_dict(x, sep="/")
    base = {"__init__": lambda self, hyper_params: setattr(self, "hyper_params", hyper_params)}
    sys.modules["t5x.optimizers"].OptimizerDef = type("OptimizerDef", (), base)
    sys.modules["t5x.optimizers"].OptimizerState = types.SimpleNamespace
    own = sys.modules["adafactor"] = types.ModuleType("adafactor")
    exec(compile(source, "adafactor.py", "exec"), own.__dict__)
    weights = {name: values for name, values in drawn(0).items() if name != "patches.embedding.weight"}
    rules = [(f"{name}.weight", tuple(own.FactorDim[axis] for axis in axes)) for name, axes in AXES.items()]
    position = (own.FactorDim.BATCH, own.FactorDim.ROW, own.FactorDim.COLUMN)
    rules = own.HParamMap([*rules, ("position", position), (".*", own.HEURISTIC_RULE)])
    made = own.Adafactor(learning_rate=RATE, min_dim_size_to_factor=MIN_DIM, factor_map=rules)
    states = {name: made.init_param_state(values, name) for name, values in weights.items()}
    for step in range(STEPS):
        gradients = drawn(1 + step)
        for name in weights:
            weights[name], states[name] = made.apply_param_gradient(
                step, made.hyper_params, weights[name], states[name], gradients[name], name
            )
    return {name: sampled(values) for name, values in weights.items()}


if __name__ == "__main__":
    sources = [Path(name).read_text(encoding="utf-8") for name in sys.argv[1:]]
    content = {"t5x": t5x(sources[0]), "big_vision": big_vision(sources[1])}
    Path(__file__).with_name("adafactor.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
