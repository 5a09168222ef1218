"""Configurations: unknown names, one owner per setting, what takes the place of stored settings, what is saved."""

import json

import pytest
from transformers import AutoConfig

from fila import FilaConfig, FilaVisionConfig, preset


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FilaConfig(image_token_idx=4), r"FilaConfig: .*'image_token_idx'; the nearest is 'image_token_id'"),
        (lambda: FilaConfig(fusion_gates="scale"), "the nearest is 'vision_config.fusion_gate'"),
        (lambda: FilaConfig(vision_config={"fusoin": "none"}), "vision_config: .*'fusoin'; the nearest is 'fusion'"),
        (lambda: FilaVisionConfig(high_res_sice=64), "'high_res_sice'; the nearest is 'high_res_size'"),
        (lambda: FilaVisionConfig(vit_config={"patch_sise": 14}), "vit_config: .*the nearest is 'patch_size'"),
        (lambda: FilaVisionConfig(convnext_config={"depth": [1]}), "convnext_config: .*the nearest is 'depths'"),
        (lambda: FilaConfig(text_config={"hidden_sizes": 64}), "text_config: .*the nearest is 'hidden_size'"),
        (lambda: FilaConfig(chunk_size_feed_forward=4), "nothing here applies them"),
    ],
)
def test_unknown_names_are_errors_that_name_the_nearest(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_names_of_a_stored_configuration_and_of_a_call_are_errors(tmp_path):
    preset("fila-nano").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'fusion_gates'; the nearest is 'vision_config\.fusion_gate'"):
        FilaConfig.from_pretrained(tmp_path, fusion_gates="scale")
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    stored["vision_config"]["fusion_gates"] = "scale"
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="'fusion_gates'; the nearest is 'fusion_gate'"):
        AutoConfig.from_pretrained(tmp_path)


def test_a_setting_has_one_owner_and_is_stored_once():
    config = preset("fila-nano")
    config.use_cache = False
    config.tie_word_embeddings = False
    assert not config.text_config.use_cache
    assert not config.text_config.tie_word_embeddings
    config.image_grid_pinpoints = config.vision_config.image_grid_pinpoints  # repeating the owner is no change
    for name, other in (("vision_feature_layer", -2), ("image_grid_pinpoints", [[64, 64]])):
        with pytest.raises(ValueError, match=f"{name} belongs to vision_config"):
            setattr(config, name, other)
    for name, other in (("image_seq_length", 5), ("vision_feature_select_strategy", "full")):
        with pytest.raises(ValueError, match=name):
            setattr(config, name, other)
    stored = config.to_dict()
    assert not {"use_cache", "vision_feature_layer", "image_grid_pinpoints", "image_seq_length"} & set(stored)
    assert not {"hidden_size", "image_size", "patch_size"} & set(stored["vision_config"])
    again = FilaConfig.from_dict(stored)
    assert again.to_dict() == stored
    assert not again.use_cache
    assert not again.tie_word_embeddings


def test_what_is_given_takes_the_place_of_what_is_stored_one_by_one():
    stored = preset("fila-nano").to_dict()
    config = FilaConfig.from_dict(
        stored, vision_config={"fusion_gate": "product", "vit_config": {"hidden_act": "quick_gelu"}}, use_cache=False
    )
    vision = config.vision_config
    assert (vision.fusion_gate, vision.vit_config.hidden_act, config.use_cache) == ("product", "quick_gelu", False)
    stored["vision_config"]["fusion_gate"] = "product"
    stored["vision_config"]["vit_config"]["hidden_act"] = "quick_gelu"
    stored["text_config"]["use_cache"] = False
    assert config.to_dict() == stored
    with pytest.raises(ValueError, match="vision_feature_layer belongs to vision_config"):
        FilaConfig.from_dict(stored, vision_feature_layer=-2)


def test_marks_that_others_leave_are_not_saved(tmp_path):
    config = preset("fila-nano")
    plain = config.to_dict()
    for part in (config, config.vision_config, config.vision_config.vit_config):
        part.left_by_a_library = True
    assert config.to_dict() == plain
    config.save_pretrained(tmp_path)
    assert "left_by_a_library" not in (tmp_path / "config.json").read_text()
    assert FilaConfig.from_pretrained(tmp_path).to_dict() == plain


def test_what_does_not_fit_is_neither_built_nor_saved(tmp_path):
    config = preset("fila-nano")
    config.vision_config.fusion_layers = [5, 4, 2, 1]
    with pytest.raises(ValueError, match="fusion_layers must name 4 ascending"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_settings_without_effect_are_kept():
    """Switching the fusion off and on again changes nothing else."""
    stored = preset("fila-nano").to_dict()
    off = FilaConfig.from_dict(stored, vision_config={"fusion": "none"})
    assert FilaConfig.from_dict(off.to_dict(), vision_config={"fusion": "deep"}).to_dict() == stored
