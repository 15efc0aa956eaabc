"""The keys of a config.json or of a GGUF file: values of the right kind, and sizes that fit each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from taskgraph.errors import ConfigError
from taskgraph.record import shown


@dataclass(frozen=True, slots=True)
class ConfigKeys:
    """The keys of a config.json, or of a GGUF file; ConfigError names the one that is missing or makes no sense."""

    name: str
    keys: Mapping[str, Any]
    source: str = "config.json"
    prefix: str = ""

    def wrong(self, key: str, reason: str) -> ConfigError:
        named = self.prefix + shown(key).strip(QUOTES)
        return ConfigError(f"{self.name}: {named} is {shown(self.keys.get(key))}; {reason}.")

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.keys.get(key)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{self.name}: its {self.source} has no {self.prefix + key!r}.")
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < MOST
        if not good:
            raise self.wrong(key, "it must be a positive number")
        return float(value)

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.number(key, default)
        if value != int(value) or value > MOST_COUNT:
            raise self.wrong(key, f"it must be a whole number of at most {MOST_COUNT}")
        return int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.keys.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.wrong(key, "it must be true or false")
        return value

    def need(self, good: bool, key: str, reason: str) -> None:
        if not good:
            raise self.wrong(key, reason)

    def part(self, key: str) -> "ConfigKeys":
        """The object under `key`, empty when there is none."""
        value = self.keys.get(key)
        value = {} if value is None else value
        if not isinstance(value, Mapping):
            raise self.wrong(key, "it must be an object")
        return ConfigKeys(f"{self.name}: {key}", value, self.source, self.prefix)


QUOTES = "'\""
MOST, MOST_COUNT, MOST_LAYERS = 1e30, (1 << 31) - 1, 1000
"""Larger numbers, counts and depths are damage: the deepest published model has 126 layers."""


def layer_count(keys: ConfigKeys, key: str) -> int:
    """The number of layers, which must be one that a graph can have."""
    layers = keys.count(key)
    keys.need(layers <= MOST_LAYERS, key, f"at most {MOST_LAYERS} layers are supported")
    return layers


class HeadKeys(NamedTuple):
    """What a kind of file calls the sizes of attention."""

    hidden: str
    heads: str
    kv_heads: str
    head_dim: str


class Heads(NamedTuple):
    """The hidden size, the heads of queries and of keys and values, and the channels of each."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int


def grouped_heads(keys: ConfigKeys, named: HeadKeys) -> Heads:
    """The sizes of grouped attention, checked against each other; by default each head has its share of the hidden
    size and keys and values of its own."""
    hidden, heads = keys.count(named.hidden), keys.count(named.heads)
    kv_heads = keys.count(named.kv_heads, heads)
    keys.need(heads % kv_heads == 0, named.kv_heads, f"{heads} attention heads are no multiple of it")
    if keys.keys.get(named.head_dim) is None:
        keys.need(hidden % heads == 0, named.heads, f"{named.hidden} {hidden} is no multiple of it")
    return rotated(keys, named, Heads(hidden, heads, kv_heads, keys.count(named.head_dim, hidden // heads)))


def rotated(keys: ConfigKeys, named: HeadKeys, sizes: Heads) -> Heads:
    """These sizes, if a head's channels can be rotated in pairs."""
    pairs = f"the rotary embedding needs pairs of channels, and a head has {sizes.head_dim}"
    keys.need(sizes.head_dim % 2 == 0, named.head_dim, pairs)
    return sizes


def rotary_base(keys: ConfigKeys, key: str, value: float) -> float:
    """The base of the rotary frequencies under `key`."""
    keys.need(value >= 1, key, "it must be at least 1")
    return value
