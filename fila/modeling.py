"""Defines the FILA vision-language model: LLaVA-NeXT with the hybrid encoder in place of its CLIP tower.

The projector, the order of tokens, unpadding, newlines, generation and loss are inherited from
`transformers.models.llava_next`. Two things differ: images come with a high-resolution raster, and the vision tower
returns the layer that is read as its last state.

Source: FILA (arXiv 2412.08378), section 3.4; token order from LLaVA-NeXT.
"""

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    LlavaNextPreTrainedModel,
)

from fila.configuration import FilaConfig
from fila.vision import FilaVisionModel


class FilaPreTrainedModel(LlavaNextPreTrainedModel):
    """Weight initialisation and loading shared by the classes below."""

    config: FilaConfig
    config_class = FilaConfig


class FilaModel(FilaPreTrainedModel, LlavaNextModel):
    """Hybrid encoder, projector and language model, without the language model's head."""

    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None,
        high_res_pixel_values: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encodes pictures into the embeddings that the language model reads.

        Args:
            pixel_values: [n_images, max_views, 3, tile, tile].
            image_sizes: [n_images, 2], height and width in the picture's own pixels.
            high_res_pixel_values: [n_images, 3, H, W]; needed unless the configuration has fusion "none".

        Returns:
            `pooler_output`: one tensor [num_tokens, text width] per picture, global view first, then the unpadded tile
            rows with one newline each. `last_hidden_state`: the encoder's, all views.
        """
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            given, settled = kwargs.pop(name, None), getattr(self.config, name)
            if given not in (None, settled):
                raise ValueError(f"{name} cannot be changed for one call: expected {settled!r}, got {given!r}")
        kwargs.pop("return_dict", None)
        layouts = self.vision_tower.layouts(pixel_values, high_res_pixel_values, image_sizes)
        hidden = self.vision_tower(
            pixel_values, high_res_pixel_values, image_sizes, layouts=layouts, **kwargs
        ).last_hidden_state
        views = self.multi_modal_projector(hidden[:, 1:]).split([layout.num_views for layout in layouts])
        sizes = [(layout.height, layout.width) for layout in layouts]
        features, _ = self.pack_image_features(views, sizes, "default", self.image_newline)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=features)

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor, image: BaseModelOutputWithPooling) -> Tensor:
        """Puts image features in the places of the image tokens.

        Args:
            input_ids: [batch, length]; None finds the image tokens by their embedding.
            inputs_embeds: [batch, length, width], the tokens' own embeddings.
            image: what `get_image_features` returned for the batch's pictures.

        Returns:
            [batch, length, width].

        Raises:
            ValueError: if image tokens and image features differ in number.
        """
        features = torch.cat(list(image.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
        mask = self.get_placeholder_mask(input_ids, inputs_embeds=inputs_embeds, image_features=features)
        return inputs_embeds.masked_scatter(mask, features)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        high_res_pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Runs the language model over text in which every image token has been replaced by its image feature.

        Args:
            input_ids: [batch, length]; each picture's placeholder already repeated `Layout.num_tokens` times.
            pixel_values, image_sizes, high_res_pixel_values: as in `get_image_features`.
            mm_encoder_outputs: `{"image": get_image_features(...)}`, where the pictures were encoded before.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        kwargs.pop("return_dict", None)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image = (mm_encoder_outputs or {}).get("image")
        if image is None and pixel_values is not None and len(pixel_values):
            image = self.get_image_features(pixel_values, image_sizes, high_res_pixel_values)
        if image is not None:
            inputs_embeds = self.embed(input_ids, inputs_embeds, image)
        elif input_ids is not None and (past_key_values is None or past_key_values.get_seq_length() == 0):
            # Image tokens without pictures are a mistake; this is the check above with no features at all.
            self.get_placeholder_mask(input_ids, inputs_embeds, inputs_embeds.new_empty(0, inputs_embeds.shape[-1]))
        return self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class FilaForConditionalGeneration(FilaPreTrainedModel, LlavaNextForConditionalGeneration):
    """FILA with its language-model head: what is trained, saved, loaded and asked."""

    def __init__(self, config: FilaConfig):
        LlavaNextPreTrainedModel.__init__(self, config)
        self.model = FilaModel(config)
        self.lm_head = torch.nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        # A generated image token would ask for an image feature that does not exist.
        self.generation_config.suppress_tokens = [config.image_token_id]

    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Tensor, high_res_pixel_values: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """See `FilaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_sizes, high_res_pixel_values, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        high_res_pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits and, with `labels` [batch, length] (-100 where nothing is asked), the next-token loss.

        The other arguments are those of `FilaModel.forward`; `logits_to_keep` as everywhere in transformers.
        """
        kwargs.pop("return_dict", None)
        num_items = {k: kwargs.pop(k) for k in ("num_items_in_batch",) if k in kwargs}
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            high_res_pixel_values=high_res_pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **num_items
            )
        # The language model's own fields by whatever names this version of transformers gives them.
        carried = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **carried)


__all__ = ["FilaForConditionalGeneration", "FilaModel", "FilaPreTrainedModel", "FilaVisionModel"]
