"""Hugging Face `transformers` MT5ForConditionalGeneration; T5 checkpoints of version 1.1 have the same names."""

from model.config import MT5Config
from model.weights.table import ForeignTensor, Table

# Copies of tensors that the table has.
COPIES = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "*.EncDecAttention.relative_attention_bias.weight",
)


def mt5_table(mt5: MT5Config) -> Table:
    """Return the table of an mT5 of this size."""
    names = {
        "bridge.embedding.weight": "shared.weight",
        "encoder_norm.norm.weight": "encoder.final_layer_norm.weight",
        "head.norm.weight": "decoder.final_layer_norm.weight",
        "head.output.weight": "lm_head.weight",
    }
    for stack, layers in (("encoder", mt5.num_encoder_layers), ("decoder", mt5.num_decoder_layers)):
        names[f"bridge.{stack}_bias.weight"] = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        for i in range(layers):
            ours, theirs = f"{stack}_block_{i}", f"{stack}.block.{i}.layer"
            mlp = f"{theirs}.{1 if stack == 'encoder' else 2}"
            names |= {
                f"{ours}.attention_norm.weight": f"{theirs}.0.layer_norm.weight",
                f"{ours}.attention_in.query.weight": f"{theirs}.0.SelfAttention.q.weight",
                f"{ours}.attention_in.key.weight": f"{theirs}.0.SelfAttention.k.weight",
                f"{ours}.attention_in.value.weight": f"{theirs}.0.SelfAttention.v.weight",
                f"{ours}.attention_out.out.weight": f"{theirs}.0.SelfAttention.o.weight",
                f"{ours}.mlp_norm.weight": f"{mlp}.layer_norm.weight",
                f"{ours}.mlp_in.gate.weight": f"{mlp}.DenseReluDense.wi_0.weight",
                f"{ours}.mlp_in.up.weight": f"{mlp}.DenseReluDense.wi_1.weight",
                f"{ours}.mlp_out.out.weight": f"{mlp}.DenseReluDense.wo.weight",
            }
            if stack == "decoder":
                names |= {
                    f"{ours}.cross_norm.weight": f"{theirs}.1.layer_norm.weight",
                    f"{ours}.cross_query.query.weight": f"{theirs}.1.EncDecAttention.q.weight",
                    f"{ours}.cross_memory.key.weight": f"{theirs}.1.EncDecAttention.k.weight",
                    f"{ours}.cross_memory.value.weight": f"{theirs}.1.EncDecAttention.v.weight",
                    f"{ours}.cross_out.out.weight": f"{theirs}.1.EncDecAttention.o.weight",
                }
    return Table(
        {ours: ForeignTensor(theirs) for ours, theirs in names.items()},
        ignored=COPIES,
        tied={"lm_head.weight": "shared.weight"},  # transformers 5 ties the two and saves one
    )
