"""The engines we compare with, in this process: torch, ONNX Runtime, OpenVINO, and CSR products of torch and SciPy.

Each is a function of a network and an input that gives a `Loaded`: something to time and its output. Dense engines get the
network of `dense_twin`; the CSR ones take chains of 1x1 convolutions and linear layers only. DeepSparse is in `deepsparse`.

Start with `ENGINES`; `missing(name)` says why an engine cannot be used here.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.kernels.dense_twin import dense_twin, onnx_bytes
from benchmarks.kernels.protocol import Clocked, InProcess
from ops.layers import SparseConv2d, SparseLinear

__all__ = ["CSR_ENGINES", "DENSE_ENGINES", "ENGINES", "Loaded", "Unsupported", "missing", "onnx_model"]


class Unsupported(ValueError):
    """An engine has no way to run this network."""


@dataclass(frozen=True)
class Loaded:
    """A network in an engine: what to time, what it computes, how to let it go, and whether it can still be timed."""

    clocked: Clocked
    output: Callable[[], np.ndarray]
    close: Callable[[], None] = lambda: None
    alive: Callable[[], bool] = lambda: True


def missing(name: str) -> str | None:
    """Why the engine cannot be used on this machine, or None."""
    package = {"ort": "onnxruntime", "openvino": "openvino"}.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"{package} is not installed; pip install 'sparse-nas[bench]'"
    return None


def onnx_model(network: nn.Module, x: torch.Tensor) -> bytes:
    """The network as every ONNX engine here gets it."""
    return onnx_bytes(dense_twin(network), x)


def _torch(network: nn.Module, x: torch.Tensor, threads: int) -> Loaded:
    return _eager(dense_twin(network), x)


def _torch_channels_last(network: nn.Module, x: torch.Tensor, threads: int) -> Loaded:
    twin = dense_twin(network)
    if x.ndim != 4:
        raise Unsupported("channels_last is a layout of images")
    return _eager(twin.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last))  # type: ignore[call-overload]


def _eager(twin: nn.Module, x: torch.Tensor) -> Loaded:
    def call() -> Any:
        with torch.inference_mode():
            return twin(x)

    return Loaded(InProcess(call), lambda: call().contiguous().numpy())


def _ort(network: nn.Module, x: torch.Tensor, threads: int) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(onnx_model(network, x), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()  # buffers bound once: nothing but the network is in the time
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x.numpy())))
    binding.bind_output("y")

    def call() -> None:
        session.run_with_iobinding(binding)

    def output() -> np.ndarray:
        call()
        return np.asarray(binding.copy_outputs_to_cpu()[0])

    return Loaded(InProcess(call), output)


def _openvino(network: nn.Module, x: torch.Tensor, threads: int) -> Loaded:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # the package then uses its own stub
    import openvino

    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",  # bfloat16 otherwise, where the CPU has it
        "ENABLE_CPU_PINNING": False,  # would pin this very thread, and with it everybody else's calls
    }
    compiled = core.compile_model(core.read_model(onnx_model(network, x), b""), "CPU", settings)
    request = compiled.create_infer_request()
    data = np.ascontiguousarray(x.numpy())
    request.set_input_tensor(openvino.Tensor(data, shared_memory=True))

    def output() -> np.ndarray:
        request.infer()
        return np.array(request.get_output_tensor().data)

    return Loaded(InProcess(request.infer), output)


# --- CSR --------------------------------------------------------------------------------------------------------------------


def _matrices(network: nn.Module) -> list[tuple[np.ndarray, np.ndarray, bool]]:
    """(masked weight [out, in], bias [out, 1], ReLU after it) of each layer of a chain.

    Raises:
        Unsupported: something else than 1x1 convolutions or linear layers with ReLUs between.
    """
    found: list[tuple[np.ndarray, np.ndarray, bool]] = []
    modules = list(network) if isinstance(network, nn.Sequential) else [network]
    if len(modules) == 1 and isinstance(modules[0], nn.ReLU):
        return []
    for module, after in pairwise([*modules, None]):
        relu = isinstance(after, nn.ReLU)
        if isinstance(module, SparseConv2d):
            plain = module.kernel_size == (1, 1) and module.stride == (1, 1) and module.groups == 1
            if not plain or module.padding != (0, 0):
                raise Unsupported("CSR products are 1x1 convolutions of stride 1 without groups")
        elif not isinstance(module, SparseLinear):
            if isinstance(module, nn.ReLU):
                continue
            raise Unsupported(f"CSR products have no {type(module).__name__}")
        assert module.bias is not None
        found.append((module.effective_weight().flatten(1).numpy(), module.bias.numpy()[:, None], relu))
    return found


def _columns(x: torch.Tensor) -> np.ndarray:
    """float[channels, batch * positions]."""
    return np.ascontiguousarray(x.flatten(2).transpose(0, 1).flatten(1).numpy() if x.ndim == 4 else x.numpy().T)


def _image(y: np.ndarray, x: torch.Tensor) -> np.ndarray:
    """`_columns` undone."""
    if x.ndim == 2:
        return y.T
    batch, _, height, width = x.shape
    return y.reshape(-1, batch, height, width).transpose(1, 0, 2, 3)


def _torch_csr(network: nn.Module, x: torch.Tensor, threads: int) -> Loaded:
    start = torch.from_numpy(_columns(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CSR tensors call themselves beta
        layers = [(torch.from_numpy(w).to_sparse_csr(), torch.from_numpy(b), relu) for w, b, relu in _matrices(network)]

    def call() -> torch.Tensor:
        with torch.inference_mode():
            y = start
            for weight, bias, relu in layers:
                y = (weight @ y).add_(bias)
                if relu:
                    y.relu_()
            return y if layers else torch.relu(y)

    return Loaded(InProcess(call), lambda: _image(call().numpy(), x))


def _scipy(network: nn.Module, x: torch.Tensor, threads: int) -> Loaded:
    from scipy.sparse import csr_array

    if threads > 1:
        raise Unsupported("SciPy's products use one thread")
    start = _columns(x)
    layers = [(csr_array(w), b, relu) for w, b, relu in _matrices(network)]

    def call() -> np.ndarray:
        y = start
        for weight, bias, relu in layers:
            y = weight @ y
            y += bias
            if relu:
                np.maximum(y, 0.0, out=y)
        return y if layers else np.maximum(y, 0.0)

    return Loaded(InProcess(call), lambda: _image(call(), x))


Load = Callable[[nn.Module, torch.Tensor, int], Loaded]
DENSE_ENGINES: dict[str, Load] = {
    "torch": _torch,
    "torch_nhwc": _torch_channels_last,
    "ort": _ort,
    "openvino": _openvino,
}
CSR_ENGINES: dict[str, Load] = {"torch_csr": _torch_csr, "scipy": _scipy}
ENGINES: dict[str, Load] = DENSE_ENGINES | CSR_ENGINES
"""`ENGINES[name](network, x, threads)` loads a masked network in eval mode; raises `Unsupported` where it cannot."""


def unknown(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """The names that are not among the known ones."""
    return [name for name in names if name not in set(known)]
