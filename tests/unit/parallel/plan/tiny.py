"""A model whose sizes all differ, and hardware that charges for one thing: so predictions are counted by hand."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from model.config import ModelConfig, MT5Config, PaLIConfig, ViTConfig
from model.costs import BatchShape, Unit
from model.pali import plan_on_meta
from parallel.config import OptimizerConfig
from parallel.plan.hardware import Hardware, Link, MatrixProducts, Rate, read_hardware
from parallel.plan.search import PhasePlan, Rows, Search

CONFIG = PaLIConfig(
    ViTConfig(width=8, depth=1, mlp_dim=24, num_heads=2, patch_size=2),
    MT5Config(
        d_model=16, d_ff=20, d_kv=6, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, vocab_size=64,
        relative_attention_num_buckets=32,
    ),
    ModelConfig(image_size=4, loss_chunk=10),
)  # fmt: skip
# 2 x 4 = 8 visual tokens, 3 x 11 = 33 encoder tokens, 3 x 7 = 21 decoder tokens
SHAPE = BatchShape(images=2, vision_tokens=4, rows=3, encoder_tokens=11, decoder_tokens=7, element_bytes=2)
UNITS = ("patches", "vit_block_0", "bridge", "encoder_block_0", "encoder_norm", "decoder_block_0", "head")
VIT = ("patches.*", "vit_block_*", "bridge.vit_norm.*")
FREE = float("inf")


@cache
def units(frozen: Sequence[str] = ()) -> dict[str, Unit]:
    with torch.device("meta"):
        return dict(plan_on_meta(CONFIG, frozen).units())


def only(
    flops: float = FREE,
    attention: float = 1.0,
    memory: float = FREE,
    launch_s: float = 0.0,
    node: float = FREE,
    network: float = FREE,
    node_s: float = 0.0,
    network_s: float = 0.0,
    **others: Any,
) -> Hardware:
    """Hardware of so many FLOP/s and B/s, with launches and steps of collectives of so many seconds; else free."""
    return Hardware(
        **{
            "name": "by hand", "devices_per_node": 8, "memory_gib": 16.0, "overhead_gib": 1.0, "communicator_mib": 1.0,
            "power_w": 1.0, "bf16": Rate(flops / 1e12, 1.0), "fp32": Rate(2 * flops / 1e12, 1.0),
            "matmul": MatrixProducts(1, 1, 0), "attention_efficiency": attention, "memory_gb_per_s": memory / 1e9,
            "memory_efficiency": 1.0, "launch_us": launch_s * 1e6, "host_ms": 0.0,
            "node": Link(node / 1e9, 1.0, node_s * 1e6), "network": Link(network / 1e9, 1.0, network_s * 1e6),
            **others,
        }
    )  # fmt: skip


H100 = read_hardware("h100_sxm", ["devices_per_node=4"])
ROWS = Rows(global_batch_size=24, images_per_row=2, encoder_length=12, decoder_length=8)
FROZEN = PhasePlan("frozen", CONFIG, VIT, ROWS, 3)
LONGER = PhasePlan("longer", CONFIG, (), replace(ROWS, global_batch_size=8, encoder_length=32), 5)


def search(gpus: int, *phases: PhasePlan, **options: Any) -> Search:
    return Search(phases or (FROZEN,), OptimizerConfig("adamw"), H100, gpus, **options)
