"""Defines the FILA vision-language model: LLaVA-NeXT with the hybrid encoder in place of its CLIP tower.

The projector, the order of tokens, unpadding, newlines, generation and loss are inherited from
`transformers.models.llava_next`. Two things differ: images come with a high-resolution raster, and the vision tower
returns the layer that is read as its last state. Arguments stand in LLaVA-NeXT's order, FILA's own last.

Source: FILA (arXiv 2412.08378), section 3.4; token order from LLaVA-NeXT.
"""

import inspect
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextCausalLMOutputWithPast,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    LlavaNextModelOutputWithPast,
    LlavaNextPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from fila.configuration import FilaConfig
from fila.vision import FilaVisionModel, loses_gradient

# Arguments of one forward pass that stand for pictures.
PICTURE_INPUTS = ("pixel_values", "image_sizes", "high_res_pixel_values", "mm_encoder_outputs")
# What this version of transformers calls the keys and values of earlier tokens: up to 5.19 past_key_values.
CACHE = "cache" if "cache" in inspect.signature(LlavaNextModel.forward).parameters else "past_key_values"
# Arguments of the loss that no layer takes.
LOSS_INPUTS = ("num_items_in_batch", "shift_labels", "ignore_index")


@dataclass
class FilaModelOutputWithPast(LlavaNextModelOutputWithPast):
    """Output of `FilaModel`.

    `image_hidden_states` [tokens of all pictures, text width]: the embeddings that took the placeholders' places, None
    without a picture. Newer versions of transformers have in its place `image_outputs`, all that `get_image_features`
    returned. The other fields are the language model's own.
    """


@dataclass
class FilaCausalLMOutputWithPast(LlavaNextCausalLMOutputWithPast):
    """Output of `FilaForConditionalGeneration`: `loss`, `logits` and the fields of `FilaModelOutputWithPast`."""


def _carry(output: ModelOutput, source: ModelOutput) -> Any:
    """Copies the fields that only `source` has, by whatever names this version of transformers gives them."""
    for name, value in source.items():
        if name != "last_hidden_state" and name not in output:
            output[name] = value
    return output


class FilaPreTrainedModel(LlavaNextPreTrainedModel):
    """Weight initialisation, loading and attention shared by the classes below."""

    config: FilaConfig
    config_class = FilaConfig

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """Sets how attention is computed: one name for all parts, or a dictionary by `text_config` and `vision_config`.

        transformers knows two levels of configurations, and the ViT's is on the third: it would take another part's.

        Raises:
            ValueError: a key that names no part, which transformers would ignore.
        """
        by_part = attn_implementation if isinstance(attn_implementation, dict) else {}
        known = ["", *self.config.sub_configs]
        if unknown := set(by_part) - set(known):
            raise ValueError(f"attn_implementation: expected keys out of {known}, got {sorted(unknown)}")
        base = self.base_model
        tower = base.vision_tower
        tower_only = tower.attention_by_part() if isinstance(attn_implementation, dict) else attn_implementation
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        tower.set_attn_implementation(by_part.get("vision_config", tower_only))


class FilaModel(FilaPreTrainedModel, LlavaNextModel):
    """Hybrid encoder, projector and language model, without the language model's head."""

    @can_return_tuple
    @merge_with_config_defaults
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | list,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        high_res_pixel_values: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encodes pictures into the embeddings that the language model reads.

        Args:
            pixel_values: [n_images, max_views, 3, tile, tile].
            image_sizes: [n_images, 2], height and width in the picture's own pixels.
            vision_feature_layer, vision_feature_select_strategy: may only repeat the configuration, for which the
                encoder was built.
            high_res_pixel_values: [n_images, 3, H, W]; needed unless the configuration has fusion "none".
            kwargs: `output_hidden_states` and `output_attentions` as in `FilaVisionModel.forward`.

        Returns:
            `pooler_output`: one tensor [num_tokens, text width] per picture, global view first, then the unpadded tile
            rows with one newline each. `last_hidden_state`: the encoder's, all views.
        """
        self._refuse_other(vision_feature_layer, vision_feature_select_strategy)
        layouts = self.vision_tower.layouts(pixel_values, high_res_pixel_values, image_sizes)
        encoded = self.vision_tower(
            pixel_values, high_res_pixel_values, image_sizes, layouts=layouts, return_dict=True, **kwargs
        )
        views = self.multi_modal_projector(encoded.last_hidden_state[:, self.config.vision_config.num_prefix_tokens :])
        features, _ = self.pack_image_features(
            views.split([layout.num_views for layout in layouts]),
            [(layout.height, layout.width) for layout in layouts],
            "default",
            self.image_newline,
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=features,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def _refuse_other(self, vision_feature_layer: int | None, vision_feature_select_strategy: str | None) -> None:
        for name, given in (
            ("vision_feature_layer", vision_feature_layer),
            ("vision_feature_select_strategy", vision_feature_select_strategy),
        ):
            settled = getattr(self.config, name)
            if given is not None and (isinstance(given, Tensor) or given != settled):
                raise ValueError(f"{name} cannot be changed for one call: expected {settled!r}, got {given!r:.60}")

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

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | list | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict | None = None,
        high_res_pixel_values: Tensor | None = None,
        cache=None,
        **kwargs,
    ) -> FilaModelOutputWithPast:
        """Runs the language model over text in which every image token has been replaced by its image feature.

        That there are as many image tokens as image features is checked where there are features; image tokens alone
        are embedded like any other token, since the pictures of a part of a prompt may have been seen before.

        Args:
            input_ids: [batch, length]; each picture's placeholder already repeated `Layout.num_tokens` times.
            pixel_values, image_sizes, high_res_pixel_values: as in `get_image_features`.
            mm_encoder_outputs: `{"image": get_image_features(...)}`, where the pictures were encoded before.
            cache: newer versions' name of `past_key_values`.
        """
        past_key_values = cache if past_key_values is None else past_key_values
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        image = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and len(pixel_values):
            if image is not None:
                raise ValueError("expected pictures as pixel_values or encoded as mm_encoder_outputs, got both")
            image = self.get_image_features(
                pixel_values,
                image_sizes,
                vision_feature_layer,
                vision_feature_select_strategy,
                high_res_pixel_values,
                return_dict=True,
            )
        # Before the text is embedded, as with pictures: processes gather sharded weights in one order.
        nothing = (
            self._features_of_nothing() if image is None and self._others_encode_pictures(past_key_values) else None
        )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if image is not None:
            inputs_embeds = self.embed(input_ids, inputs_embeds, image)
        if nothing is not None:
            inputs_embeds = inputs_embeds + nothing.to(inputs_embeds)
        if any(loses_gradient(inputs_embeds, layer) for layer in getattr(self.language_model, "layers", ())):
            inputs_embeds = inputs_embeds.detach().requires_grad_()
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name) is None:
                kwargs.pop(name, None)
                if getattr(self.config, name, False):
                    kwargs[name] = True
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **{CACHE: past_key_values},
            **kwargs,
        )
        result = FilaModelOutputWithPast(last_hidden_state=outputs.last_hidden_state)
        if "image_outputs" in {field.name for field in fields(result)}:
            result["image_outputs"] = image
        elif image is not None:
            result["image_hidden_states"] = torch.cat(list(image.pooler_output))
        return _carry(result, outputs)

    def _others_encode_pictures(self, past_key_values: Any) -> bool:
        """Whether other processes may wait for this one's part in the encoder, though it was given no picture.

        In training they wait for gradients. A sharded encoder (FSDP2) is gathered in evaluation too, but for prompts
        only: a pass that goes on from a cache has no picture on any process.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return False
        from torch.distributed.fsdp import FSDPModule

        parts = (self.vision_tower, self.multi_modal_projector)
        if any(isinstance(module, FSDPModule) for part in parts for module in part.modules()):
            return self.training or past_key_values is None or past_key_values.get_seq_length() == 0
        weights = [self.image_newline, *(weight for part in parts for weight in part.parameters())]
        return self.training and any(weight.requires_grad for weight in weights)

    def _features_of_nothing(self) -> Tensor:
        """Zero, by way of every weight that a picture would pass: a batch of text alone takes part in collectives.

        Distributed training needs gradients of zero from a process without a picture where its neighbours have some;
        without them it waits for ever or refuses the next step.
        """
        geometry = self.config.vision_config.geometry()
        height, width = min(geometry.canvases, key=lambda canvas: canvas[0] * canvas[1])
        layout = geometry.layout(height, width)
        newline = self.image_newline
        image = self.get_image_features(
            newline.new_zeros(1, layout.num_views, 3, geometry.tile, geometry.tile),
            [[height, width]],
            high_res_pixel_values=newline.new_zeros(1, 3, *layout.raster),
            return_dict=True,
        )
        return torch.cat(list(image.pooler_output)).sum() * 0


class NoImageToken(LogitsProcessor):
    """Forbids the image token: once generated, it would ask for an image feature that does not exist."""

    def __init__(self, image_token: int):
        self.image_token = image_token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.image_token] = -torch.inf
        return scores


class FilaForConditionalGeneration(FilaPreTrainedModel, LlavaNextForConditionalGeneration):
    """FILA with its language-model head: what is trained, saved, loaded and asked."""

    def __init__(self, config: FilaConfig):
        config.check()
        LlavaNextPreTrainedModel.__init__(self, config)
        self.model = FilaModel(config)
        self.lm_head = torch.nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        # For engines that read generation_config.json and not this class; `generate` forbids the token by itself.
        self.generation_config.suppress_tokens = [config.image_token_id]

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | list,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        high_res_pixel_values: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """See `FilaModel.get_image_features`."""
        return self.model.get_image_features(
            pixel_values,
            image_sizes,
            vision_feature_layer,
            vision_feature_select_strategy,
            high_res_pixel_values,
            return_dict=True,
            **kwargs,
        )

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | list | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        high_res_pixel_values: Tensor | None = None,
        cache=None,
        **kwargs,
    ) -> FilaCausalLMOutputWithPast:
        """Logits and, with `labels` [batch, length] (-100 where nothing is asked), the next-token loss.

        The other arguments are those of `FilaModel.forward`; `logits_to_keep`, `num_items_in_batch` and `shift_labels`
        (labels already moved by one, as context-parallel training gives them) as everywhere in transformers.
        """
        for_loss = {name: kwargs.pop(name) for name in LOSS_INPUTS if name in kwargs}
        outputs = self.model(
            input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache if past_key_values is None else past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            high_res_pixel_values=high_res_pixel_values,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None or for_loss.get("shift_labels") is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **for_loss, **kwargs
            )
        return _carry(FilaCausalLMOutputWithPast(loss=loss, logits=logits), outputs)

    def generate(
        self, inputs: Tensor | None = None, generation_config=None, logits_processor=None, *args: Any, **kwargs: Any
    ) -> Any:
        """As `transformers.GenerationMixin.generate`; the image token is never generated, whatever else is asked."""
        processors = LogitsProcessorList([*(logits_processor or ()), NoImageToken(self.config.image_token_id)])
        return super().generate(inputs, generation_config, processors, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        inputs_embeds: Tensor | None = None,  # named, or `generate` would not take any
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; encoded pictures go into the prompt alone, which transformers 5.17 forgets."""
        if not is_first_iteration and kwargs.get("use_cache", True):
            kwargs.pop("mm_encoder_outputs", None)
        return super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> FilaCausalLMOutputWithPast:
        """The pass over the prompt; in chunks (`prefill_chunk_size`), pictures are merged into the whole prompt first.

        A chunk alone does not know which image features are its own: transformers drops them (5.19) or merges them
        into the first chunk (5.17).
        """
        chunk = generation_config.prefill_chunk_size
        if chunk is None or not is_first_iteration:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        given = {name: model_kwargs[name] for name in PICTURE_INPUTS if model_kwargs.get(name) is not None}
        kept = {name: value for name, value in model_kwargs.items() if name not in PICTURE_INPUTS}
        image = given.pop("mm_encoder_outputs", {}).get("image")
        if image is None and given.get("pixel_values") is not None:
            image = self.model.get_image_features(**given, return_dict=True)
        mask, positions = kept.pop("attention_mask", None), kept.pop("position_ids", None)
        embeds = kept.pop("inputs_embeds", None)
        cache = kept[CACHE]
        past = int(cache.get_seq_length())
        if embeds is None:
            # A mask of ones alone has been dropped; only its length is left.
            length = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
            if past and length == input_ids.shape[1]:
                input_ids = input_ids[:, past:]  # the whole conversation was given, and its beginning is in the cache
            embeds = self.get_input_embeddings()(input_ids)
            embeds = embeds if image is None else self.model.embed(input_ids, embeds, image)
        else:
            embeds = embeds[:, past:] if image is None else self.model.embed(None, embeds[:, past:], image)
            input_ids = torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)  # for their shape alone
        end = past + embeds.shape[1]
        positions = None if positions is None else positions[..., -embeds.shape[1] :]
        mask = None if mask is None else mask[:, -end:]
        forward = self
        if self._valid_auto_compile_criteria(model_kwargs, generation_config):
            forward = self.get_compiled_call(generation_config.compile_config)
        for start in range(0, embeds.shape[1], chunk):
            part = slice(start, start + chunk)
            ids = input_ids[:, part]
            inputs = self.prepare_inputs_for_generation(
                ids,
                inputs_embeds=embeds[:, part],
                is_first_iteration=True,
                attention_mask=None if mask is None else mask[:, : past + start + ids.shape[1]],
                position_ids=None if positions is None else positions[..., part],
                **{**kept, CACHE: cache},
            )
            outputs = forward(**inputs, return_dict=True)
            cache = outputs[CACHE]
        return outputs


__all__ = ["FilaForConditionalGeneration", "FilaModel", "FilaPreTrainedModel", "FilaVisionModel"]
