"""The constructor call of a torch layer, recovered from the layer: `nn.Conv2d(3, 16, 3, padding=1, bias=False)`.

One mechanism serves all layers: arguments are looked up among the layer's attributes by the names in the constructor's
signature, the layer is built again from them on the meta device, and the copy is compared with the original: same class,
same parameters and buffers by name, shape and dtype, same plain attributes, same children. Only then is the text used. The few
layers that do not keep their arguments under their own names are listed in `RECOVERIES`.

What it does not do: layers outside torch.nn; values of parameters (they travel in the weights file).

Start with `constructor`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nas.export.errors import ExportError, first_line
from nas.export.literals import literal

_SKIPPED = ("device", "dtype", "process_group")
_MODULE_FIELDS = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, str, type(None))


def _transformer_layer(layer: Any) -> dict[str, Any]:
    return {
        "d_model": layer.self_attn.embed_dim,
        "nhead": layer.self_attn.num_heads,
        "dim_feedforward": layer.linear1.out_features,
        "dropout": layer.dropout.p,
        "activation": layer.activation,
        "layer_norm_eps": layer.norm1.eps,
        "batch_first": layer.self_attn.batch_first,
        "bias": layer.linear1.bias is not None,
    }


# Arguments a layer does not keep under their own names: class -> function of the layer -> {argument: value}.
RECOVERIES: dict[type[nn.Module], Callable[[Any], dict[str, Any]]] = {
    nn.Bilinear: lambda m: {"bias": m.bias is not None},
    nn.RNN: lambda m: {"nonlinearity": {"RNN_TANH": "tanh", "RNN_RELU": "relu"}[m.mode]},
    nn.MultiheadAttention: lambda m: {
        "bias": m.in_proj_bias is not None,
        "add_bias_kv": m.bias_k is not None,
        "kdim": None if m.kdim == m.embed_dim else m.kdim,
        "vdim": None if m.vdim == m.embed_dim else m.vdim,
    },
    nn.TransformerEncoderLayer: _transformer_layer,
    nn.TransformerDecoderLayer: _transformer_layer,
    nn.Transformer: lambda m: {
        "num_encoder_layers": m.encoder.num_layers,
        "num_decoder_layers": m.decoder.num_layers,
        **_transformer_layer(m.encoder.layers[0]),
        "norm_first": m.encoder.layers[0].norm_first,
    },
    nn.AdaptiveLogSoftmaxWithLoss: lambda m: {"cutoffs": m.cutoffs[:-1]},
    nn.TransformerEncoder: lambda m: {"encoder_layer": m.layers[0]},
    nn.TransformerDecoder: lambda m: {"decoder_layer": m.layers[0]},
}


def constructor(layer: nn.Module, name: str) -> str:
    """The expression that builds a layer like this one.

    Arguments that equal their defaults are left out, and equal tuples are written as one number, where the rebuilt layer
    shows that this makes no difference.

    Args:
        layer: a layer whose class belongs to torch.nn.
        name: the layer's name in its network, for the error.

    Raises:
        ExportError: no constructor call builds this layer; says what differs.
    """
    names, required = _parameters(type(layer))
    values = _arguments(layer, names)
    missing = [argument for argument in required if argument not in values]
    if missing:
        raise ExportError(
            f"{name}: expected to find the constructor arguments of {type(layer).__name__} on the layer, "
            f"found none for {', '.join(missing)}; write the layer as a module of your own, with a forward method"
        )
    difference = _difference(layer, values)
    if difference is not None:
        raise ExportError(
            f"{name}: expected that {_text(layer, names, required, values)} builds this layer, found a difference: {difference}; "
            "remove hooks and re-parametrisations (torch.nn.utils.*.remove) or write the layer as a module of your own"
        )
    for argument in names:
        if argument in values and argument not in required:
            fewer = {key: value for key, value in values.items() if key != argument}
            if _difference(layer, fewer) is None:
                values = fewer
    for argument, value in list(values.items()):
        if isinstance(value, tuple) and len(value) > 0 and all(type(v) is int and v == value[0] for v in value):
            shorter = {**values, argument: value[0]}
            if _difference(layer, shorter) is None:
                values = shorter
    return _text(layer, names, required, values)


def _parameters(cls: type[nn.Module]) -> tuple[list[str], list[str]]:
    """Names of all constructor arguments of a class in order, and of those without a default."""
    source: type[nn.Module] = nn.RNNBase if issubclass(cls, nn.RNNBase) else cls
    found = [
        p
        for p in list(inspect.signature(source.__init__).parameters.values())[1:]
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in _SKIPPED and not p.name.startswith("_")
    ]
    if issubclass(cls, nn.RNNBase):
        found = [p for p in found if p.name != "mode" and (p.name != "proj_size" or cls is nn.LSTM)]
    names = [p.name for p in found]
    required = [p.name for p in found if p.default is p.empty]
    if cls is nn.RNN:
        names.append("nonlinearity")
    return names, required


def _arguments(layer: nn.Module, names: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for argument in names:
        if argument in layer._parameters:
            values[argument] = layer._parameters[argument] is not None
        elif hasattr(layer, argument) and not isinstance(getattr(layer, argument), Tensor):
            values[argument] = getattr(layer, argument)
    for cls in type(layer).__mro__:
        if cls in RECOVERIES:
            values.update({key: value for key, value in RECOVERIES[cls](layer).items() if key in names})
            break
    return {key: tuple(value) if isinstance(value, (torch.Size, list)) else value for key, value in values.items()}


def _difference(layer: nn.Module, values: dict[str, Any]) -> str | None:
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whatever the constructor has to say was said when the network was built
            rebuilt = type(layer)(**values)
    except Exception as error:
        return f"building it raises {type(error).__name__}: {first_line(error)}"
    return _unlike(layer, rebuilt.eval(), "")


def _unlike(found: nn.Module, rebuilt: nn.Module, prefix: str) -> str | None:
    """How two modules differ in anything but the values of their tensors; None if they do not."""
    if type(found) is not type(rebuilt):
        return f"{prefix or 'the layer'} is {type(found).__name__}, not {type(rebuilt).__name__}"
    for kind in ("_parameters", "_buffers"):
        ours, theirs = _shapes(getattr(found, kind)), _shapes(getattr(rebuilt, kind))
        if ours != theirs:
            return f"{kind[1:]} of {prefix or 'the layer'} are {ours}, not {theirs}"
    for key, value in vars(rebuilt).items():
        if key in _MODULE_FIELDS or not (_is_plain(value) or inspect.isroutine(value)):
            continue
        if key not in vars(found) or vars(found)[key] != value:
            return f"{prefix}{key} is {vars(found).get(key)!r}, not {value!r}"
    if list(found._modules) != list(rebuilt._modules):
        return f"children of {prefix or 'the layer'} are {list(found._modules)}, not {list(rebuilt._modules)}"
    for key, child in rebuilt._modules.items():
        other = found._modules[key]
        if (child is None) != (other is None):
            return f"{prefix}{key} is {other}, not {child}"
        if child is not None and other is not None:
            difference = _unlike(other, child, f"{prefix}{key}.")
            if difference is not None:
                return difference
    return None


def _shapes(tensors: dict[str, Tensor | None]) -> dict[str, str]:
    return {
        key: "None" if t is None else f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}"
        for key, t in tensors.items()
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, (*_PLAIN, torch.Size))


def _text(layer: nn.Module, names: list[str], required: list[str], values: dict[str, Any]) -> str:
    parts = []
    for argument in names:
        if argument not in values:
            continue
        value = values[argument]
        text = constructor(value, argument) if isinstance(value, nn.Module) else literal(value, argument)
        parts.append(text if argument in required else f"{argument}={text}")
    return f"nn.{type(layer).__name__}({', '.join(parts)})"
