"""Windows and rotations of the layers, as the families of Hugging Face describe them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rapshee_engine.models.config import LayerConfig
from rapshee_engine.models.fields import Fields
from rapshee_engine.models.limits import MAX_CONTEXT, MAX_LAYERS

__all__ = [
    "ReadLayers",
    "alternating_layers",
    "equal_layers",
    "gemma3_layers",
    "plain_layers",
    "qwen_layers",
    "smollm3_layers",
]

ReadLayers = Callable[[Fields, int], tuple[LayerConfig, ...]]
"""(fields, number of layers) -> what differs between them."""

_DEFAULT_WINDOW = 4096
_GEMMA3_PATTERN = 6
_SMOLLM3_INTERVAL = 4


def plain_layers(fields: Fields, num_layers: int) -> tuple[LayerConfig, ...]:
    if fields.has("sliding_window"):
        raise fields.unsupported("sliding_window", "null")
    return (LayerConfig(),) * num_layers


def equal_layers(default_window: int) -> ReadLayers:
    """One window for all layers."""

    def read(fields: Fields, num_layers: int) -> tuple[LayerConfig, ...]:
        return (LayerConfig(window=_window(fields, default_window)),) * num_layers

    return read


def qwen_layers(fields: Fields, num_layers: int) -> tuple[LayerConfig, ...]:
    """A window where ``layer_types`` says so; without that, from ``max_window_layers`` on."""
    window = 0
    if fields.flag("use_sliding_window", default=False):
        window = _window(fields, _DEFAULT_WINDOW)
    first = fields.integer("max_window_layers", 0, MAX_LAYERS, 28)
    slides = _slides(fields, [bool(window) and i >= first for i in range(num_layers)], window)
    return tuple(LayerConfig(window=window if slide else 0) for slide in slides)


def alternating_layers(fields: Fields, num_layers: int) -> tuple[LayerConfig, ...]:
    """Gemma 2: every other layer has a window, the first one too."""
    window = fields.integer("sliding_window", 1, MAX_CONTEXT, _DEFAULT_WINDOW)
    slides = _slides(fields, [i % 2 == 0 for i in range(num_layers)], window)
    return tuple(LayerConfig(window=window if slide else 0) for slide in slides)


def gemma3_layers(fields: Fields, num_layers: int) -> tuple[LayerConfig, ...]:
    """Every sixth layer sees everything and has the first rope; others the second one."""
    window = fields.integer("sliding_window", 1, MAX_CONTEXT, _DEFAULT_WINDOW)
    pattern = fields.integer("sliding_window_pattern", 1, MAX_LAYERS, _GEMMA3_PATTERN)
    if not fields.has("layer_types"):
        # What transformers writes beside layer_types, and does not read.
        fields.require_neutral({"_sliding_window_pattern": pattern})
    slides = _slides(fields, [(i + 1) % pattern != 0 for i in range(num_layers)], window)
    return tuple(LayerConfig(rope=1, window=window) if s else LayerConfig() for s in slides)


def smollm3_layers(fields: Fields, num_layers: int) -> tuple[LayerConfig, ...]:
    """Every fourth layer does not rotate; only such layers may have a window by default."""
    rotates = _rotating_layers(fields, num_layers)
    window = 0
    if fields.flag("use_sliding_window", default=False):
        window = _window(fields, 0)
    slides = _slides(fields, [bool(window) and not rotate for rotate in rotates], window)
    return tuple(
        LayerConfig(rope=0 if rotate else -1, window=window if slide else 0)
        for rotate, slide in zip(rotates, slides, strict=True)
    )


def _rotating_layers(fields: Fields, num_layers: int) -> list[bool]:
    interval = fields.integer("no_rope_layer_interval", 1, MAX_LAYERS, _SMOLLM3_INTERVAL)
    if not fields.has("no_rope_layers"):
        return [(i + 1) % interval != 0 for i in range(num_layers)]
    rotates = fields.get("no_rope_layers")
    if not isinstance(rotates, list) or len(rotates) < num_layers:
        raise fields.invalid("no_rope_layers", f"a list of at least {num_layers} numbers")
    if not all(type(value) is int and value in (0, 1) for value in rotates):
        raise fields.invalid("no_rope_layers", "a list of 0 and 1")
    return [value == 1 for value in rotates[:num_layers]]


def _slides(fields: Fields, default: Sequence[bool], window: int) -> Sequence[bool]:
    """Which layers have a window, as ``layer_types`` says."""
    if not fields.has("layer_types"):
        return default
    types = fields.get("layer_types")
    if not isinstance(types, list) or len(types) != len(default):
        raise fields.invalid("layer_types", f"a list of {len(default)} types")
    known = ("full_attention", "sliding_attention") if window else ("full_attention",)
    if not all(type(name) is str and name in known for name in types):
        raise fields.unsupported("layer_types", ", ".join(known))
    return [name == "sliding_attention" for name in types]


def _window(fields: Fields, default: int) -> int:
    """Tokens that a query sees, its own included; 0: all."""
    # Here null is a value: it turns off the window that an absent key leaves on.
    if not fields.is_listed("sliding_window"):
        return default
    if not fields.has("sliding_window"):
        return 0
    return fields.integer("sliding_window", 1, MAX_CONTEXT)
