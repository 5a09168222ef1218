"""Upstream's common tests over FILA and, in the same harness, over LLaVA-NeXT, from which FILA inherits.

Run by `make test-upstream` (tools/upstream.py), which compares both: nothing here is skipped by hand. Every class of
FILA has one of LLaVA-NeXT with the same mixins, the same sizes and the same questions.
"""

# Copyright 2026 as upstream's test of initialisation looks for it.

import unittest
from contextlib import contextmanager
from unittest import mock

import torch
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    LlavaNextProcessor,
    conversion_mapping,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from fila import (
    FilaConfig,
    FilaForConditionalGeneration,
    FilaImageProcessor,
    FilaModel,
    FilaProcessor,
    FilaVisionConfig,
)
from fila.geometry import Geometry
from recipes.nano.tokenizer import build_character_tokenizer
from tests.upstream.harness import GenerationTesterMixin

# Not before the harness has put the stubs in place.
from upstream_tests.test_configuration_common import ConfigTester  # isort: skip
from upstream_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor  # isort: skip
from upstream_tests.test_processing_common import ProcessorTesterMixin  # isort: skip
from upstream_tests.test_training_mixin import TrainingTesterMixin  # isort: skip

TILE, PATCH, STRIDE = 8, 4, 8
# Above the tokens that the mixin of training learns to write, since FILA never writes its image token.
IMAGE_TOKEN = 20
TEXT = dict(
    model_type="llama", vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
VIT = dict(
    model_type="clip_vision_model", hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
    image_size=TILE, patch_size=PATCH, projection_dim=32,
)  # fmt: skip
CANVASES = [[TILE, TILE]]


class Questions:
    """What the mixins ask of a model: its configuration and inputs, three questions about one picture each."""

    batch_size = 3
    is_training = True
    num_hidden_layers = TEXT["num_hidden_layers"]
    num_attention_heads = TEXT["num_attention_heads"]
    hidden_size = TEXT["hidden_size"]
    vocab_size = TEXT["vocab_size"]
    text_config = TEXT
    vision_config = VIT
    geometry = Geometry(TILE, PATCH, STRIDE, tuple((h, w) for h, w in CANVASES))
    num_image_tokens = geometry.layout(TILE, TILE).num_tokens
    seq_length = 7 + num_image_tokens
    encoder_seq_length = key_length = seq_length
    causal_lm_class: type

    def __init__(self, parent):
        self.parent = parent

    def pixels(self) -> dict[str, torch.Tensor]:
        return {
            "pixel_values": floats_tensor([self.batch_size, 2, 3, TILE, TILE]),
            "image_sizes": torch.tensor([[TILE, TILE]] * self.batch_size),
        }

    def prepare_config_and_inputs_for_common(self):
        others = IMAGE_TOKEN + 1
        ids = ids_tensor([self.batch_size, self.seq_length], TEXT["vocab_size"] - others) + others
        ids[:, 1 : 1 + self.num_image_tokens] = IMAGE_TOKEN
        return self.get_config(), {**self.pixels(), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


class LlavaNextQuestions(Questions):
    causal_lm_class = LlavaNextForConditionalGeneration
    base_model_class = LlavaNextModel

    def get_config(self):
        return LlavaNextConfig(
            text_config=TEXT, vision_config=VIT, image_token_index=IMAGE_TOKEN, image_grid_pinpoints=CANVASES,
            vision_feature_layer=-1, image_seq_length=self.num_image_tokens,
        )  # fmt: skip


class FilaQuestions(Questions):
    causal_lm_class = FilaForConditionalGeneration
    base_model_class = FilaModel
    fusion = "deep"

    def get_config(self):
        vision = FilaVisionConfig(
            vit_config=CLIPVisionConfig(**VIT),
            convnext_config=dict(hidden_sizes=[8, 16], depths=[1, 1], patch_size=4),
            vision_feature_layer=-1, image_grid_pinpoints=CANVASES, fusion=self.fusion, high_res_size=STRIDE,
        )  # fmt: skip
        return FilaConfig(text_config=TEXT, vision_config=vision, image_token_index=IMAGE_TOKEN)

    def pixels(self):
        height, width = self.geometry.layout(TILE, TILE).raster
        return {**super().pixels(), "high_res_pixel_values": floats_tensor([self.batch_size, 3, height, width])}


class FilaWithoutFusionQuestions(FilaQuestions):
    fusion = "none"

    def pixels(self):
        return Questions.pixels(self)


@contextmanager
def renamed():
    """Enters LLaVA-NeXT's older names of weights for FILA, whose weights never had others."""
    names = conversion_mapping.get_checkpoint_conversion_mapping("llava_next")
    conversion_mapping.register_checkpoint_conversion_mapping("fila", names)
    try:
        yield
    finally:
        del conversion_mapping._checkpoint_conversion_mapping_cache["fila"]
        conversion_mapping.USER_REGISTERED_MAPPINGS.remove("fila")


class ModelTests(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    """The common part of both."""

    inputs_class: type
    config_class: type
    pipeline_model_mapping: dict = {}
    _is_composite = True
    test_resize_embeddings = True
    # [views in the batch, ...] and not [pictures, ...], in both models.
    skip_test_image_features_output_shape = True
    model_tester = None  # abstract in one mixin, set below

    def setUp(self):
        self.model_tester = self.inputs_class(self)
        self.config_tester = ConfigTester(
            self, config_class=self.config_class, has_text_modality=False, common_properties=["image_token_id"]
        )

    def test_config(self):
        self.config_tester.run_common_tests()


class LlavaNextModelTest(ModelTests, unittest.TestCase):
    inputs_class, config_class = LlavaNextQuestions, LlavaNextConfig
    all_model_classes = (LlavaNextModel, LlavaNextForConditionalGeneration)


class FilaModelTest(ModelTests, unittest.TestCase):
    inputs_class, config_class = FilaQuestions, FilaConfig
    all_model_classes = (FilaModel, FilaForConditionalGeneration)

    def test_can_init_all_missing_weights(self):
        # Upstream skips models that are older than 2023, which it tells by a line of the configuration's file.
        with mock.patch("inspect.getfile", return_value=__file__):
            super().test_can_init_all_missing_weights()

    def test_reverse_loading_mapping(self):
        with renamed():
            super().test_reverse_loading_mapping(skip_base_model=True)  # as upstream's own test of LLaVA-NeXT

    def test_can_load_from_already_mapped_keys(self):
        with renamed():
            super().test_can_load_from_already_mapped_keys()


class FilaWithoutFusionModelTest(FilaModelTest):
    inputs_class = FilaWithoutFusionQuestions


class ProcessorTests(ProcessorTesterMixin):
    """The common part of both: nano's tokenizer and canvases."""

    @classmethod
    def _setup_tokenizer(cls):
        return build_character_tokenizer()


class LlavaNextProcessorTest(ProcessorTests, unittest.TestCase):
    processor_class = LlavaNextProcessor

    @classmethod
    def _setup_image_processor(cls):
        side = {"height": TILE, "width": TILE}
        return LlavaNextImageProcessorPil(size={"shortest_edge": TILE}, crop_size=side, image_grid_pinpoints=CANVASES)

    @staticmethod
    def prepare_processor_dict():
        template = build_character_tokenizer().chat_template
        return {
            "chat_template": template,
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        }


class FilaProcessorTest(ProcessorTests, unittest.TestCase):
    processor_class = FilaProcessor

    @classmethod
    def _setup_image_processor(cls):
        return FilaImageProcessor.from_geometry(Questions.geometry)


# pytest collects a class that derives from unittest.TestCase wherever it sees its name; mixins alone are no tests.
del ModelTesterMixin, ProcessorTesterMixin, TrainingTesterMixin
