"""Base of FILA's configurations: every name has one owner, and unknown names are errors.

transformers keeps any name that it is given and saves it again. Here a misspelt name is an error that suggests the
nearest setting. A part's setting can be read from the whole but is stored once. Everything is checked when a
configuration is made, used and saved.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

# Names that transformers itself reads from, or leaves in, any configuration beside its fields.
GENERAL_NAMES = {
    "_attn_implementation_internal", "_commit_hash", "_experts_implementation_internal", "_name_or_path",
    "attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path", "num_labels",
    "output_attentions", "per_layer_config", "quantization_config", "stage_names", "tie_last_hidden_states",
    "torch_dtype",
}  # fmt: skip


def own_names(config: type[PreTrainedConfig]) -> set[str]:
    """The settings that a class of configurations adds to transformers' general ones, by all their names."""
    general = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    fields = {field.name for field in dataclasses.fields(config)} - general
    views = {name for name in dir(config) if isinstance(getattr(config, name), property)} - set(dir(PreTrainedConfig))
    return fields | views | set(config.attribute_map)


def known_names(config: type[PreTrainedConfig]) -> set[str]:
    """Every name that a class of configurations may be given."""
    return own_names(config) | {field.name for field in dataclasses.fields(PreTrainedConfig)} | GENERAL_NAMES


def refuse_unknown(
    config: type[PreTrainedConfig], given: Mapping[str, Any], likeness: float = 0.0, place: str | None = None
) -> None:
    """Refuses settings that the class does not have, each with the nearest that it or a part of it has.

    Args:
        given: settings by name; None asks for nothing and passes.
        likeness: 0..1; unknown names that are less like a known one than that pass.

    Raises:
        ValueError: such a setting.
    """
    for name, value in given.items():
        if name in known_names(config) or value is None:
            continue
        places = {known: known for known in own_names(config)}
        for part, kind in config.sub_configs.items():
            kind = kind if issubclass(kind, PreTrainedConfig) else CONFIG_MAPPING["llama"]
            places = {known: f"{part}.{known}" for known in own_names(kind)} | places
        near = difflib.get_close_matches(name, places, 1, likeness)
        if near:
            raise ValueError(
                f"{place or config.__name__}: expected a setting that it has, got {name!r}; "
                f"the nearest is {places[near[0]]!r}"
            )


def part_of(owner: str, name: str, writable: bool = False) -> property:
    """A setting that one part of a configuration owns, seen from the whole.

    Args:
        owner: the attribute that holds the part.
        writable: whether writing reaches the owner; else it may only repeat what the owner has, since the owner's
            other settings depend on it.
    """

    def read(self: PreTrainedConfig) -> Any:
        return getattr(getattr(self, owner), name)

    def write(self: PreTrainedConfig, value: Any) -> None:
        owned = read(self)
        if writable:
            setattr(getattr(self, owner), name, value)
        elif value is not None and _as_lists(value) != _as_lists(owned):
            raise ValueError(f"{name} belongs to {owner}, which has {owned}; got {value} beside it")

    return property(read, write, doc=f"`{owner}.{name}`.")


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def make_part(kind: type[PreTrainedConfig], given: Any, default: dict, place: str) -> Any:
    """The configuration of a part, from one or from a dictionary; unknown names are errors."""
    if isinstance(given, kind):
        return given
    if isinstance(given, PreTrainedConfig) or not isinstance(given, (dict, type(None))):
        raise ValueError(f"{place}: expected a {kind.__name__} or a dictionary, got {type(given).__name__}")
    given = dict(given or default)
    named = given.get("model_type", kind.model_type)
    if named != kind.model_type:
        raise ValueError(f"{place}: expected model_type {kind.model_type!r}, got {named!r}")
    refuse_unknown(kind, given, place=place)
    return kind(**given)


class OwnedFields(PreTrainedConfig):
    """Rules that both configurations share: a name has one owner, unknown names are errors, and all is checked again.

    `check` runs when a configuration is made, when a model is built from it and when it is saved, since fields can be
    written in between.
    """

    def __post_init__(self, **kwargs):
        refuse_unknown(type(self), kwargs)
        if self.is_encoder_decoder or self.chunk_size_feed_forward:
            raise ValueError(
                f"{type(self).__name__}: expected is_encoder_decoder and chunk_size_feed_forward left out, since "
                "nothing here applies them"
            )
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Raises ValueError where the settings do not fit each other."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """The configuration of a dictionary, `kwargs` in place of its entries, those of a part one by one."""
        return_unused = kwargs.pop("return_unused_kwargs", False)
        own = known_names(cls) - GENERAL_NAMES - {"dtype"}
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in own}
        config, unused = super().from_dict(_merged(config_dict, given), return_unused_kwargs=True, **kwargs)
        if return_unused:
            return config, unused
        refuse_unknown(cls, {name: value for name, value in unused.items() if not name.startswith("_")})
        return config

    def to_dict(self):
        """The settings. Marks that others have left on the configuration are none, and would not load again."""
        return _known(self, super().to_dict())

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        self.check()
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _known(config: PreTrainedConfig, values: dict) -> dict:
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    for name, part in parts.items():
        if isinstance(part, PreTrainedConfig) and config.sub_configs[name] is type(part):
            values[name] = _known(part, values[name])
    names = known_names(type(config)) | {name for name in values if name.startswith("_")}
    return {name: value for name, value in values.items() if name in names}


def _merged(old: dict, new: dict) -> dict:
    return old | {
        name: _merged(old[name], value) if isinstance(value, dict) and isinstance(old.get(name), dict) else value
        for name, value in new.items()
    }
