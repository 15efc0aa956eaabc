"""Which keys of a config.json are read, which change nothing here, and which settings are refused by name."""

from collections.abc import Mapping
from typing import Any

from taskgraph.models.documents import known_formats, words
from taskgraph.models.families import ModelFamily
from taskgraph.models.keys import ConfigKeys
from taskgraph.models.stretch import neutral, number_is

_KNOWN = known_formats()["hf"]
_READ, _HARMLESS = words(_KNOWN["read"]), words(" ".join(_KNOWN["harmless"].values()))
_UNCHANGED: Mapping[str, list[Any]] = _KNOWN["unchanged"]
"""Settings that are honoured with these values only (and when they are null): with others they change arithmetic."""


def check_keys(keys: ConfigKeys, family: ModelFamily) -> None:
    """ConfigError for a key that is neither read for this family nor known to be harmless, and for a setting that
    changes arithmetic in a way that the graphs do not have."""
    read = _READ | family.reads
    for key, value in keys.keys.items():
        if value is None or key in read or key in _HARMLESS or key.startswith(("_", "unsloth")):
            continue
        if key == "qkv_bias":
            keys.need(value is family.qkv_bias, key, f"the family {family.name} has none other")
        elif key in _UNCHANGED:
            allowed = " or ".join(map(repr, _UNCHANGED[key])) or "null"
            keys.need(neutral(value, *_UNCHANGED[key]), key, f"only {allowed} is supported")
        else:
            raise keys.wrong(
                key,
                "this version does not know the key, which may change the arithmetic: remove it if it does not, "
                "or use a supported model",
            )
    for key, value in family.only:
        keys.need(keys.keys.get(key, value) == value, key, f"this version knows {value}")
    _check_window(keys, family)


def _check_window(keys: ConfigKeys, family: ModelFamily) -> None:
    """Attention within a window is not supported; a window as wide as the context is none."""
    kinds = keys.keys.get("layer_types")
    good = kinds is None or (isinstance(kinds, list) and all(isinstance(k, str) for k in kinds))
    keys.need(good, "layer_types", "it must be a list of names")
    window, layers = keys.keys.get("sliding_window"), keys.count("num_hidden_layers")
    wide = not window or keys.count("sliding_window") >= keys.count("max_position_embeddings", 2048)
    for kind in kinds or ():
        known = kind == "full_attention" or (kind == "sliding_attention" and bool(window) and wide)
        keys.need(known, "layer_types", "only full attention is supported")
    if family.window_switch:
        slides = keys.flag("use_sliding_window") and kinds is None and layers > _full_layers(keys)
    else:
        slides = kinds is None
    if slides and not wide:
        raise keys.wrong("sliding_window", "attention within a window is not supported")


def _full_layers(keys: ConfigKeys) -> int:
    """How many layers come before the first that slides, by the rule of Qwen's configs."""
    value = keys.keys.get("max_window_layers")
    return 0 if value == 0 else keys.count("max_window_layers", 28)


def check_scale(keys: ConfigKeys, head_dim: int) -> None:
    """ConfigError for scores that are scaled by anything but the usual 1 / sqrt(head_dim)."""
    good = number_is(keys.keys.get("query_pre_attn_scalar"), head_dim)
    keys.need(good, "query_pre_attn_scalar", f"scores are scaled by the head size, {head_dim}, only")
    good = number_is(keys.keys.get("attention_multiplier"), head_dim**-0.5)
    keys.need(good, "attention_multiplier", f"scores are multiplied by 1 / sqrt({head_dim}) only")
