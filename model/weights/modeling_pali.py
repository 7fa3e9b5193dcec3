# mypy: ignore-errors
"""PaLI for Hugging Face transformers: a ViT whose patch tokens join the text in the encoder of an mT5, T5 or UMT5.

This file is copied into an exported folder and needs torch and transformers (5 or later) alone:

    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    model.generate(pixel_values=…, input_ids=…, attention_mask=…)

The text part has the parameter names of its own class, and the ViT those of SiglipVisionModel below `vision_model`.
So the folder's `text` and `vision` are folders of those classes, and hold the weights of this one.
"""

import copy

import torch
from torch import nn
from transformers import (
    AutoConfig,
    MT5ForConditionalGeneration,
    PreTrainedConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5ForConditionalGeneration,
    UMT5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput


class PaLIConfig(PreTrainedConfig):
    """Hold the settings of the text part at the top level, and those of the ViT in `vision_config`."""

    model_type = "pali"

    def __init__(self, text_config=None, vision_config=None, **kwargs):
        text = dict(text_config or {})
        self.text_config = AutoConfig.for_model(text.pop("model_type", "mt5"), **text)
        self.vision_config = SiglipVisionConfig(**(vision_config or {}))
        ids = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
        given = {name: getattr(self.text_config, name) for name in ids}
        # T5's class reads the last one: T5 1.1 scales nothing.
        given |= {"is_encoder_decoder": True, "tie_word_embeddings": False, "scale_decoder_outputs": False} | kwargs
        super().__init__(**given)

    def to_dict(self):
        """Return all settings as plain values."""
        text = self.text_config.to_dict() | {"tie_word_embeddings": False}  # T5 would scale its outputs
        return super().to_dict() | {"text_config": text, "vision_config": self.vision_config.to_dict()}

    def get_text_config(self, decoder=None, encoder=None):
        """Return the settings of the text part; its number of layers is that of the decoder where that is wanted."""
        config = copy.copy(self.text_config)
        if decoder:
            config.num_layers = config.num_decoder_layers
        return config


class _Encoder(nn.Module):
    """Encode images and text; `generate` finds it by `get_encoder`. The model that it belongs to owns the weights."""

    main_input_name = "input_ids"

    def __init__(self, model):
        super().__init__()
        object.__setattr__(self, "model", model)

    def forward(
        self, input_ids=None, attention_mask=None, pixel_values=None, inputs_embeds=None, return_dict=True, **kwargs
    ):
        """input_ids [B, L] and pixel_values [B, 3, S, S] or [B, images, 3, S, S] -> [B, images * tokens + L, d]."""
        model = self.model
        if inputs_embeds is None:
            inputs_embeds = model.shared(input_ids)
        if pixel_values is not None:
            visual = model.visual_tokens(pixel_values).to(inputs_embeds.dtype)
            inputs_embeds = torch.cat([visual, inputs_embeds], dim=1)
            attention_mask = model.with_visual_tokens(attention_mask, inputs_embeds)
        return model.encoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)


class PaLIMixin:
    """Add the ViT and the projection of its tokens to an encoder-decoder of the T5 family."""

    config_class = PaLIConfig
    base_model_prefix = ""
    _tied_weights_keys = {  # noqa: RUF012  (not the head)
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }
    _no_split_modules = ["MT5Block", "T5Block", "UMT5Block", "SiglipEncoderLayer"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config.text_config)
        self.text_config, self.config = self.config, config
        self.vision_model = SiglipVisionModel(config.vision_config)
        self.projection = nn.Linear(config.vision_config.hidden_size, config.text_config.d_model)

    def get_encoder(self, modality=None):
        """Return the ViT for "image", else the encoder of images and text."""
        return self.vision_model if modality == "image" else _Encoder(self)

    def visual_tokens(self, pixel_values):
        """[B, 3, S, S] or [B, images, 3, S, S] -> [B, images * tokens, d]."""
        pixels = pixel_values.reshape(-1, *pixel_values.shape[-3:])
        features = self.vision_model(pixels.to(self.vision_model.dtype)).last_hidden_state
        return self.projection(features.to(self.projection.weight.dtype)).reshape(
            pixel_values.shape[0], -1, self.projection.out_features
        )

    def with_visual_tokens(self, attention_mask, encoded):
        """Put ones for the visual tokens before a mask of the text; [B, L] -> [B, encoder length]."""
        if attention_mask is None:
            return None
        missing = encoded.shape[1] - attention_mask.shape[1]
        return torch.cat([attention_mask.new_ones(attention_mask.shape[0], missing), attention_mask], dim=1)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        pixel_values=None,
        encoder_outputs=None,
        inputs_embeds=None,
        decoder_input_ids=None,
        past_key_values=None,
        labels=None,
        **kwargs,
    ):
        """Return the logits, and the loss of `labels`; visual tokens come before the text."""
        if encoder_outputs is None:
            encoder_outputs = self.get_encoder()(input_ids, attention_mask, pixel_values, inputs_embeds)
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(last_hidden_state=encoder_outputs[0])
        return super().forward(
            attention_mask=self.with_visual_tokens(attention_mask, encoder_outputs[0]),
            encoder_outputs=encoder_outputs,
            decoder_input_ids=decoder_input_ids,
            past_key_values=past_key_values,
            labels=labels,
            **kwargs,
        )


class PaLIForConditionalGeneration(PaLIMixin, MT5ForConditionalGeneration):
    """PaLI whose text part is an mT5."""


class PaLIT5ForConditionalGeneration(PaLIMixin, T5ForConditionalGeneration):
    """PaLI whose text part is a T5 1.1 or Flan-T5."""


class PaLIUMT5ForConditionalGeneration(PaLIMixin, UMT5ForConditionalGeneration):
    """PaLI whose text part is an umT5, with a table of relative biases in each layer."""
