"""mT5 (T5 1.1) as units: bridge (embeddings), encoder blocks, the encoder's norm, decoder blocks, vocabulary head."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention.bias import bias_by_distance, relative_bias
from model.attention.kernels import KERNELS, kernel_name, split_heads
from model.attention.masks import Mask
from model.batch import MicroBatch
from model.cache import Cache, attend
from model.config import ModelConfig, MT5Config, ViTConfig
from model.costs import BatchShape, Cost, Unit, attention_flops, linear_flops
from model.dropout import dropout, masked, split_mask, value_dropout
from model.initializers import fan_in_normal, fan_in_truncated, normal, xavier_uniform
from model.layers import ColumnLinear, Embedding, Linear, RowLinear, split_parameter
from model.loss import VocabularyLoss, next_logits, totals_by_objective
from model.norms import LayerNorm, RMSNorm
from model.recompute import GatedGELU, gated_gelu, recomputed
from model.tensor_parallel import TensorParallel

Tensors = tuple[Tensor, ...]


class Carry(NamedTuple):
    """The tensors that units pass on, from the bridge to the last decoder block, and between pipeline stages.

    B rows, L encoder positions, M decoder positions, d = d_model. Under sequence parallelism a rank has its share of
    L and M.
    """

    encoder: Tensor  # [L, B, d]
    decoder: Tensor  # [M, B, d]
    encoder_bias: Tensor  # fp32 [heads / tensor, 2 R - 1]; empty rows where each block has a table of its own
    decoder_bias: Tensor  # fp32 [heads / tensor, 2 R - 1]; R: `model.attention.bias.reach` of the decoder's rows


class RelativeBias(nn.Module):
    """The relative-bias table of a stack (mT5, T5X) or of one block (umT5): [buckets, heads / tensor]."""

    def __init__(self, config: MT5Config, parallel: TensorParallel, bidirectional: bool) -> None:
        super().__init__()
        self.config, self.bidirectional = config, bidirectional
        shape = config.relative_attention_num_buckets, config.num_heads
        self.weight = split_parameter("weight", shape, 1, parallel, xavier_uniform)

    def forward(self, length: int) -> Tensor:
        """Length of a row -> the bias by distance, fp32 [heads / tensor, 2 R - 1]; see `bias_by_distance`."""
        return bias_by_distance(self.weight, self.config, length, self.bidirectional)


class Bridge(Unit):
    """The end of the ViT and the begin of the mT5.

    Visual tokens are normed, projected to d_model (one Linear, as in PaLI-3) and placed in the encoder's rows; without
    a ViT, rows are text alone. Decoder embeddings are looked up here too and carried along, so that no parameter is
    tied across pipeline stages.
    """

    def __init__(self, vit: ViTConfig | None, mt5: MT5Config, model: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        self.vit, self.mt5, self.dropout_rate, self.parallel = vit, mt5, model.dropout_rate, parallel
        if vit is not None:
            self.tokens = vit.num_tokens(model.image_size)
            partial = parallel.sequence or parallel.whole_vit  # each rank has a part of the positions, or of the images
            self.vit_norm = LayerNorm(vit.width, partial_gradient=partial)
            self.projection = Linear(vit.width, mt5.d_model, weight_init=fan_in_truncated, partial_gradient=partial)
        self.embedding = Embedding(mt5.vocab_size, mt5.d_model, parallel, weight_init=normal(1.0))
        shared = not mt5.bias_per_layer
        self.encoder_bias = RelativeBias(mt5, parallel, bidirectional=True) if shared else None
        self.decoder_bias = RelativeBias(mt5, parallel, bidirectional=False) if shared else None

    def forward(self, carry: Tensors, batch: MicroBatch) -> Carry:
        """(vision [N, I, width],), or () without a ViT -> (encoder, decoder, encoder_bias, decoder_bias)."""
        # One look-up for both, because each would make a dense gradient as large as the table.
        words = self.embedding(torch.cat([batch.encoder_tokens, batch.decoder_tokens], dim=1))
        encoder, decoder = words.split([batch.encoder_tokens.shape[1], batch.decoder_tokens.shape[1]])
        decoder = decoder.clone()  # a view would keep the encoder's look-ups until the backward pass
        if self.vit is not None:
            visual = self.parallel.gather_images(self.projection(self.vit_norm(carry[0])))
            visual = visual[:, : self.tokens].flatten(0, 1)  # [I * tokens, d]
            index = batch.visual_index.t().contiguous()
            encoder = torch.where((index >= 0).unsqueeze(-1), visual[index.clamp(min=0)], encoder)
        encoder, decoder = (self.parallel.scatter(dropout(x, self.dropout_rate, self)) for x in (encoder, decoder))
        # Made here for all blocks; a lookup in each would add up the table's gradient in 16 bits, block by block.
        none = encoder.new_zeros(self.mt5.num_heads // self.parallel.size, 1, dtype=torch.float32)
        lengths = batch.encoder_tokens.shape[1], batch.decoder_tokens.shape[1]
        each = zip((self.encoder_bias, self.decoder_bias), lengths, strict=True)
        return Carry(encoder, decoder, *(none if bias is None else bias(length) for bias, length in each))

    def cost(self, shape: BatchShape) -> Cost:
        """See Unit.cost. Kept: the norm's input and output; per text position ids, visual index and kind."""
        w, d, tokens = self.vit.width if self.vit else 0, self.mt5.d_model, shape.images * shape.vision_tokens
        tables = 0 if self.mt5.bias_per_layer else 2 * self.mt5.bias_size
        return Cost(
            (2 * w + w * d + d if self.vit else 0) + self.mt5.vocab_size * d + tables,
            linear_flops(tokens, w, d),
            shape.element_bytes * 2 * tokens * w + shape.rows * (17 * shape.encoder_tokens + 8 * shape.decoder_tokens),
        )


class Block(Unit):
    """The common part of encoder and decoder blocks: pre-norm self-attention and gated MLP, with dropout."""

    bidirectional = True

    def __init__(self, mt5: MT5Config, model: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        d, inner = mt5.d_model, mt5.inner
        self.mt5, self.dropout_rate, self.parallel = mt5, model.dropout_rate, parallel
        self.kernel = kernel_name(model.attention, on_gpu=torch.cuda.is_available())
        kernels = {"query": normal((d * mt5.d_kv) ** -0.5), "key": fan_in_normal, "value": fan_in_normal}
        self.attention_norm = RMSNorm(d, parallel)
        self.attention_in = ColumnLinear(d, dict.fromkeys(kernels, inner), parallel, bias=False, weight_init=kernels)
        self.attention_out = RowLinear(inner, d, "out", parallel, bias=False, weight_init=fan_in_normal)
        self.mlp_norm = RMSNorm(d, parallel)
        self.mlp_in = ColumnLinear(
            d, {"gate": mt5.d_ff, "up": mt5.d_ff}, parallel, bias=False, weight_init=fan_in_truncated
        )
        self.mlp_out = RowLinear(mt5.d_ff, d, "out", parallel, bias=False, weight_init=fan_in_truncated)
        self.relative_bias = RelativeBias(mt5, parallel, self.bidirectional) if mt5.bias_per_layer else None

    def bias(self, of_stack: Tensor, length: int) -> Tensor:
        """Return the bias by distance of this block for rows of that length: its own, else that of its stack."""
        return of_stack if self.relative_bias is None else self.relative_bias(length)

    @property
    def bias_size(self) -> int:
        """Elements of the block's own relative-bias table."""
        return self.mt5.bias_size if self.mt5.bias_per_layer else 0

    def project(self, x: Tensor) -> list[Tensor]:
        """[L, B, d] -> query, key, value [L, B, heads / tensor, d_kv]."""
        projected = self.after_norm(self.attention_norm, x, self.attention_in)
        return [split_heads(y, self.mt5.d_kv) for y in projected]

    def attention(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Mask) -> Tensor:
        """Attend with the kernel that is chosen, and dropout.

        query [Lq, B, heads / tensor, d_kv], key and value [Lk, ...], bias by distance or None -> [Lq, B, inner /
        tensor].
        """
        value = value_dropout(value, self.dropout_rate, self, self.parallel)
        return KERNELS[self.kernel](query, key, value, bias, mask, self.recompute == "attention")

    def self_attention(self, x: Tensor, of_stack: Tensor, mask: Mask) -> Tensor:
        """[L, B, d] -> [L, B, d], with the residual; `of_stack`: the bias by distance of the stack."""
        query, key, value = self.project(x)
        attended = self.attention(query, key, value, self.bias(of_stack, len(query)), mask)
        return x + dropout(self.attention_out(attended), self.dropout_rate, self)

    def kept_weights(self, shape: BatchShape, queries: int, keys: int) -> int:
        """Return the bytes of attention weights kept: none if the attention is fused."""
        return 0 if self.kernel == "flex" else shape.element_bytes * shape.rows * self.mt5.num_heads * queries * keys

    def mlp(self, x: Tensor) -> Tensor:
        """[L, B, d] -> [L, B, d], with the residual."""
        gate, up = self.after_norm(self.mlp_norm, x, self.mlp_in)
        mask = split_mask(gate, self.dropout_rate, self, self.parallel)
        if self.recomputes("mlp"):
            hidden = masked(GatedGELU.apply(gate, up), mask)
            inputs = gate.detach(), up.detach()
            with recomputed(hidden, lambda: masked(gated_gelu(*inputs), mask), self.mlp_out):
                out = self.mlp_out(hidden)
        else:
            out = self.mlp_out(masked(F.gelu(gate, approximate="tanh") * up, mask))
        return x + dropout(out, self.dropout_rate, self)


class EncoderBlock(Block):
    """Self-attention with bidirectional relative bias, then the MLP."""

    def forward(self, carry: Tensors, batch: MicroBatch) -> Carry:
        """Carry -> Carry with a new `encoder` [L, B, d]."""
        given = Carry(*carry)
        encoder = self.self_attention(given.encoder, given.encoder_bias, batch.encoder_mask)
        return given._replace(encoder=self.mlp(encoder))

    def cost(self, shape: BatchShape) -> Cost:
        """See Unit.cost. Kept: two norms' inputs and outputs, q k v, attended, gate, its GELU, up, their product."""
        d, i, f, length = self.mt5.d_model, self.mt5.inner, self.mt5.d_ff, shape.encoder_tokens
        tokens = shape.rows * length
        flops = linear_flops(tokens, d, 4 * i + 3 * f) + attention_flops(shape.rows, length, length, i)
        element, weights = shape.element_bytes * tokens, self.kept_weights(shape, length, length)
        kept = element * (4 * d + 4 * i + 4 * f) + weights
        parameters, again = 4 * d * i + 3 * d * f + 2 * d + self.bias_size, (2 * f * element, 2 * d * element)
        return Cost(parameters, flops, kept, element * d, weights, *again)


class EncoderNorm(Unit):
    """The norm after the last encoder block."""

    def __init__(self, mt5: MT5Config, model: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        self.mt5, self.dropout_rate = mt5, model.dropout_rate
        self.norm = RMSNorm(mt5.d_model, parallel)

    def forward(self, carry: Tensors, batch: MicroBatch) -> Carry:
        """Carry -> Carry with a new `encoder` [L, B, d]."""
        given = Carry(*carry)
        return given._replace(encoder=dropout(self.norm(given.encoder), self.dropout_rate, self))

    def cost(self, shape: BatchShape) -> Cost:
        """See Unit.cost. Kept: the norm's input and output."""
        kept = shape.element_bytes * 2 * shape.rows * shape.encoder_tokens * self.mt5.d_model
        return Cost(self.mt5.d_model, 0.0, kept)


class DecoderBlock(Block):
    """Causal self-attention with relative bias, cross-attention without, then the MLP.

    The encoder's output is whole: `gather` runs once before the first of consecutive blocks, `ungather` after the last.
    """

    bidirectional = False

    def __init__(self, mt5: MT5Config, model: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__(mt5, model, parallel)
        d, inner = mt5.d_model, mt5.inner
        self.cross_norm = RMSNorm(d, parallel)
        self.cross_query = ColumnLinear(
            d, {"query": inner}, parallel, bias=False, weight_init=normal((d * mt5.d_kv) ** -0.5)
        )
        self.cross_memory = ColumnLinear(
            d, {"key": inner, "value": inner}, parallel, bias=False, weight_init=fan_in_normal, gathered=True
        )
        self.cross_out = RowLinear(inner, d, "out", parallel, bias=False, weight_init=fan_in_normal)

    def forward(self, carry: Tensors, batch: MicroBatch) -> Carry:
        """Carry -> Carry with a new `decoder` [M, B, d]."""
        given = Carry(*carry)  # `encoder` whole
        decoder = self.self_attention(given.decoder, given.decoder_bias, batch.decoder_mask)
        key, value = self.memory(given.encoder)
        attended = self.attention(self.project_cross(decoder), key, value, None, batch.cross_mask)
        decoder = decoder + dropout(self.cross_out(attended), self.dropout_rate, self)
        return given._replace(decoder=self.mlp(decoder))

    def gather(self, carry: Tensors) -> Carry:
        """Make the encoder's output whole on every tensor-parallel rank, for several blocks."""
        given = Carry(*carry)
        return given._replace(encoder=self.parallel.gather(given.encoder, partial_gradient=True))

    def ungather(self, carry: Tensors) -> Carry:
        """Undo `gather`, so that another stage receives the encoder's output as it was."""
        given = Carry(*carry)
        return given._replace(encoder=self.parallel.ungather(given.encoder))

    def project_cross(self, x: Tensor) -> Tensor:
        """[M, B, d] -> the query of cross-attention [M, B, heads / tensor, d_kv]."""
        return split_heads(self.after_norm(self.cross_norm, x, self.cross_query)[0], self.mt5.d_kv)

    def start_cache(self, encoder: Tensor) -> Cache:
        """Return an empty cache that attends to the encoder's output [L, B, d]."""
        key, value = (y.permute(1, 2, 0, 3).contiguous() for y in self.memory(encoder))
        return Cache(key, value)

    def memory(self, encoder: Tensor) -> list[Tensor]:
        """[L, B, d] -> key and value of cross-attention [L, B, heads / tensor, d_kv]."""
        return [split_heads(y, self.mt5.d_kv) for y in self.cross_memory(encoder)]

    def decoding_bias(self, of_stack: Tensor, before: int, new: Tensor) -> Tensor:
        """Return what is added to the scores of positions `new` [M, ...] after `before` others: [1, heads, M, all].

        Blocks that share the table of their stack share it.
        """
        count, length = len(new), before + len(new)
        bias = relative_bias(self.bias(of_stack, length), count, length, new.dtype, first_query=before)
        if count > 1:
            past = torch.ones(bias.shape[1:], dtype=torch.bool, device=bias.device).tril(before)
            bias = bias.masked_fill(~past, torch.finfo(bias.dtype).min)
        return bias.unsqueeze(0)

    def decode(self, x: Tensor, bias: Tensor, cache: Cache, cross_mask: Tensor) -> Tensor:
        """Decode M positions [M, B * N, d] after those in `cache`, and extend it: [M, B * N, d].

        N hypotheses of one row follow each other. They are queries of one cross-attention, because they share the
        row's encoder. `bias`: of `decoding_bias`. cross_mask bool [B, 1, 1, L].
        """
        query, key, value = self.project(x)
        keys, values = cache.extend(key, value)
        attended = attend(query.permute(1, 2, 0, 3), keys, values, bias)
        x = x + self.attention_out(attended.permute(2, 0, 1, 3).flatten(2))
        query = self.project_cross(x).unflatten(1, (cross_mask.shape[0], -1))  # [M, B, N, heads, d_kv]
        queries = query.permute(1, 3, 0, 2, 4).flatten(2, 3)  # [B, heads, M * N, d_kv]
        attended = attend(queries, cache.cross_key, cache.cross_value, cross_mask)
        attended = attended.unflatten(2, (len(x), -1)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        return self.mlp(x + self.cross_out(attended))

    def cost(self, shape: BatchShape) -> Cost:
        """See Unit.cost. Cross-attention has keys and values of every encoder token.

        Kept: as in the encoder, and the same tensors of cross-attention.
        """
        d, i, f, n, m = self.mt5.d_model, self.mt5.inner, self.mt5.d_ff, shape.encoder_tokens, shape.decoder_tokens
        flops = (
            linear_flops(shape.rows * n, d, 2 * i)
            + linear_flops(shape.rows * m, d, 6 * i + 3 * f)
            + attention_flops(shape.rows, m, m, i)
            + attention_flops(shape.rows, m, n, i)
        )
        element, weights = shape.element_bytes * shape.rows, self.kept_weights(shape, m, m + n)
        kept = element * (m * (6 * d + 6 * i + 4 * f) + 2 * n * i) + weights
        parameters, again = 8 * d * i + 3 * d * f + 3 * d + self.bias_size, (2 * f * element * m, 3 * d * element * m)
        return Cost(parameters, flops, kept, element * m * d, weights, *again)


class VocabularyOutput(nn.Module):
    """The untied output matrix, [vocabulary / tensor, d]; logits are not scaled (T5X `logits_via_embedding=False`)."""

    def __init__(self, mt5: MT5Config, model: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        self.model, self.parallel = model, parallel
        self.weight = split_parameter("weight", (mt5.vocab_size, mt5.d_model), 0, parallel, fan_in_truncated)

    def forward(self, hidden: Tensor, targets: Tensor | None = None, loss_scale: float = 1.0) -> Tensors:
        """Return (loss_scale * summed loss, statistics [3, T]) of hidden [T, d] and targets int64 [T].

        Without targets, returns (logits,): fp32 [T, vocabulary / tensor].
        """
        if targets is None:
            return (next_logits(hidden, self.weight),)
        weight: Tensor = self.weight
        if not torch.is_grad_enabled():  # `needs_input_grad` of an autograd.Function is true even without autograd
            hidden, weight = hidden.detach(), weight.detach()
        return VocabularyLoss.apply(
            hidden, weight, targets, loss_scale, self.model.z_loss, self.model.loss_chunk, self.parallel.group
        )  # type: ignore


class HeadOutput(NamedTuple):
    """The results of a forward pass; T target tokens."""

    loss: Tensor  # scalar: loss_scale * sum over targets of nll + z-loss
    totals: Tensor  # fp32 [4, num_objectives]: nll, z-loss, correct, targets
    statistics: Tensor  # fp32 [3, T]: nll, z-loss and correctness of every target


class Head(Unit):
    """The decoder's norm, the vocabulary and the loss."""

    gives_loss = True

    def __init__(self, mt5: MT5Config, model: ModelConfig, num_objectives: int, parallel: TensorParallel) -> None:
        super().__init__()
        self.mt5, self.model, self.num_objectives, self.parallel = mt5, model, num_objectives, parallel
        self.norm = RMSNorm(mt5.d_model, parallel)
        self.output = VocabularyOutput(mt5, model, parallel)

    def forward(self, carry: Tensors, batch: MicroBatch, loss_scale: float = 1.0) -> HeadOutput:
        """Carry -> (loss, totals, statistics); `loss_scale` multiplies the summed loss."""
        decoder = self.parallel.gather(
            dropout(self.norm(Carry(*carry).decoder), self.model.dropout_rate, self), partial_gradient=True
        )
        at = batch.target_positions
        assert at is not None
        loss, statistics = self.output(decoder.flatten(0, 1)[at], batch.decoder_targets.t().reshape(-1)[at], loss_scale)
        totals = totals_by_objective(statistics, batch.objectives.t().reshape(-1)[at], self.num_objectives)
        return HeadOutput(loss, totals, statistics)

    def cost(self, shape: BatchShape) -> Cost:
        """See Unit.cost. Kept: the norm's input, the gradient of its output, and target positions; no logits."""
        d, tokens = self.mt5.d_model, shape.rows * shape.decoder_tokens
        kept = (shape.element_bytes * 2 * d + 12) * tokens
        return Cost(d + self.mt5.vocab_size * d, linear_flops(tokens, d, self.mt5.vocab_size), kept)
