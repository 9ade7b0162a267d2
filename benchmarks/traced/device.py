"""A pretended GPU in a CPU build of PyTorch. Import it before torch; it needs g++ once per version of torch.

In `pretended_gpu()`, tensors of device "cuda" have a shape, a dtype and autograd, but no values (PyTorch's
FakeTensorMode). What a program asks of the GPU is counted: kernels, the bytes that they read and write, the bytes that
are alive, and where the host waits. Nothing is timed. An operator whose tensors are not all on the GPU fails as on one.
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent.parent
_SOURCE = Path(__file__).with_name("device.cpp")


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def why_unavailable() -> str | None:
    """Return why there can be no pretended GPU here, or None."""
    version = (_torch_folder() / "version.py").read_text(encoding="utf-8")
    if "cuda: Optional[str] = None" not in version:
        return "this build of PyTorch is for a GPU"
    return None if shutil.which("g++") else "there is no g++"


def _library() -> Path:
    """Compile device.cpp for the installed PyTorch, in about ten seconds, unless that was done before."""
    torch_folder = _torch_folder()
    identity = _SOURCE.read_bytes() + (torch_folder / "version.py").read_bytes() + str(torch_folder).encode()
    library = (
        Path(tempfile.gettempdir()) / "recode-benchmarks" / f"device-{hashlib.sha256(identity).hexdigest()[:16]}.so"
    )
    if not library.is_file():
        library.parent.mkdir(parents=True, exist_ok=True)
        temporary = library.with_suffix(f".{os.getpid()}")
        headers = [f"-I{torch_folder}/include", f"-I{torch_folder}/include/torch/csrc/api/include"]
        libraries = [f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu"]
        command = ["g++", "-O0", "-shared", "-fPIC", "-std=c++20", *headers, str(_SOURCE), "-o", str(temporary)]
        subprocess.run([*command, *libraries], check=True)
        temporary.replace(library)
    return library


if reason := why_unavailable():
    raise ImportError(f"No GPU can be pretended: {reason}.")
assert "torch" not in sys.modules, "import benchmarks.traced.device before torch"
ctypes.CDLL(str(_torch_folder() / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
ctypes.CDLL(str(_library()))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager  # noqa: E402
from torch.nn.attention import varlen  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from model import attention, elementwise, frozen_weights, generate, lora  # noqa: E402

_ALIGNMENT = 512  # of the CUDA allocator, in bytes
_WITHOUT_KERNEL = {  # besides views
    "aten.empty.memory_format",
    "aten.empty_like.default",
    "aten.empty_strided.default",
    "aten.new_empty.default",
    "aten.new_empty_strided.default",
    "aten._unsafe_view.default",
    "aten.lift_fresh.default",
    "aten.detach.default",
}


def _project_line() -> str:
    """Return FILE:LINE of the project's code that is being executed."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if name := _project_file(frame.f_code.co_filename):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside of the project"


@functools.cache
def _project_file(name: str) -> str | None:
    file = Path(name)
    if file.is_relative_to(ROOT) and ".venv" not in file.parts and file.parent != _SOURCE.parent:
        return str(file.relative_to(ROOT))
    return None


@functools.cache
def _is_view(func: Any) -> bool:
    return any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)


def _view(func: Any, args: Any, kwargs: Any) -> Any:
    """Return what FakeTensorMode would for a view, in a third of the time."""
    mode, device = args[0].fake_mode, args[0].fake_device
    with in_kernel_invocation_manager(mode):
        result = func(*args, **kwargs)
    if isinstance(result, (list, tuple)):
        return [FakeTensor(mode, each, device) for each in result]
    return FakeTensor(mode, result, device)


@functools.cache
def _launches_kernel(func: Any) -> bool:
    return str(func) not in _WITHOUT_KERNEL and not str(func).startswith("prim.")


def _is_on_gpu(tensor: Any) -> bool:
    # Not Tensor.is_cuda, which is dispatched like an operator.
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"


def _is_on_host(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cpu"


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in arguments or results of an operator."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _on_gpu(value: Any) -> Iterator[torch.Tensor]:
    return filter(_is_on_gpu, _tensors(value))


class Trace(TorchDispatchMode):
    """What was asked of the GPU since the last `restart`.

    Attributes:
        kernels: launches by operator.
        moved: bytes read and written, by operator; a tensor that is read twice by one kernel counts once.
        waits: how often the host waited for the GPU, by reason and line.
        copies: copies from the host's memory that do not make it wait, by line and kind of memory.
        copied_to_host: copies of each storage on the GPU to the host's memory.
        alive, peak: bytes of tensors now, and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.slots_per_expert = 1  # what `tolist` returns in steps: the ends of the experts' slots
        self._sizes: dict[int, int] = {}
        self._pinned: set[int] = set()
        self._fused = False
        self.restart()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper that it avoids takes longer than `__torch_dispatch__`

    def restart(self) -> None:
        """Forget what was counted, except for what is alive."""
        self.kernels: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.copied_to_host: Counter[int] = Counter()
        self.peak = self.alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked more often than anything is computed
            return args[0].fake_device
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            if _is_on_gpu(args[0]):
                self.waits[f"item at {_project_line()}"] += 1
            return False if args[0].dtype is torch.bool else 1.0 if args[0].is_floating_point() else 1
        if _is_view(func) and isinstance(args[0], FakeTensor) and args[0].constant is None:
            return _view(func, args, kwargs)
        result = func(*args, **kwargs)
        if not self._fused and not _is_view(func):
            self._count(func, str(func), args, kwargs, result)
        return result

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        on_gpu = list(_on_gpu((args, kwargs, result)))
        if not on_gpu:
            return
        if "._fused_" in name and any(_is_on_host(each) for each in _tensors((args, kwargs))):
            raise RuntimeError(f"{name}: not all tensors are on the same device")  # which FakeTensorMode accepts
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            self._count_copy(func, args, kwargs, result)
        if func is None or _launches_kernel(func):
            self.kernels[name] += 1
            storages = {each.untyped_storage()._cdata: each for each in on_gpu}
            self.moved[name] += sum(min(each.nbytes, each.untyped_storage().nbytes()) for each in storages.values())
        for each in _on_gpu(result):
            self._keep(each.untyped_storage())

    def _count_copy(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        in_place = func is torch.ops.aten.copy_.default
        source = args[1] if in_place else args[0]
        if _is_on_gpu(source) == _is_on_gpu(result):
            return
        way = "to the host" if _is_on_gpu(source) else "from the host"
        if _is_on_gpu(source):
            self.copied_to_host[source.untyped_storage()._cdata] += 1
        if not (args[2] if in_place and len(args) > 2 else kwargs.get("non_blocking", False)):
            self.waits[f"copy {way} at {_project_line()}"] += 1
            return
        pinned = (source, result)[_is_on_gpu(source)].untyped_storage()._cdata in self._pinned
        self.copies[f"{way}, {'pinned' if pinned else 'pageable'} memory, at {_project_line()}"] += 1

    def _keep(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._sizes:
            self._set_size(storage)
            weakref.finalize(storage, self._free, storage._cdata)

    def _set_size(self, storage: torch.UntypedStorage) -> None:
        self._sizes[storage._cdata] = -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
        self.alive += self._sizes[storage._cdata]
        self.peak = max(self.peak, self.alive)

    def _free(self, key: int) -> None:
        self.alive -= self._sizes.pop(key, 0)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Count the bytes of a tensor whose storage has changed: FSDP frees and allocates parameters in place."""
        if storage._cdata in self._sizes:
            self._free(storage._cdata)
            self._set_size(storage)

    def as_one_kernel(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is counted as a single kernel, as the GPU's own or torch.compile's would be."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._fused:
                return function(*args, **kwargs)
            self._fused = True
            try:
                result = function(*args, **kwargs)
            finally:
                self._fused = False
            self._count(None, name, args, kwargs, result)
            return result

        return call

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mark a tensor's memory as pinned."""
        self._pinned.add(tensor.untyped_storage()._cdata)
        return tensor


@dataclasses.dataclass(frozen=True)
class GpuModel:
    """What PyTorch says of a GPU."""

    name: str
    capability: tuple[int, int]
    memory_gib: int

    @property
    def has_flash(self) -> bool:
        return self.capability >= (8, 0)


H100 = GpuModel("NVIDIA H100 80GB HBM3", (9, 0), 80)
A100 = GpuModel("NVIDIA A100-SXM4-80GB", (8, 0), 80)
V100 = GpuModel("Tesla V100-SXM2-32GB", (7, 0), 32)


@contextlib.contextmanager
def pretended_gpu(model: GpuModel = H100) -> Iterator[Trace]:
    """Pretend that this process has eight such GPUs; yield the counts."""
    trace = Trace()
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))  # which asks whether there is a GPU
        for name, value in _cuda_functions(model, trace).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for target, name, value in _kernels(model, trace):
            stack.enter_context(mock.patch.object(target, name, value, create=True))
        stack.enter_context(mock.patch.dict(attention.ENGINES, xformers=_xformers))
        stack.enter_context(trace)
        for table in (frozen_weights._nf4_levels, frozen_weights._nf4_pairs):
            table.cache_clear()  # of tensors of another pretended GPU
            stack.callback(table.cache_clear)
        yield trace


def _cuda_functions(model: GpuModel, trace: Trace) -> dict[str, Callable[..., Any]]:
    memory = model.memory_gib << 30
    stream = type("Stream", (_Stream,), {"trace": trace})
    properties = types.SimpleNamespace(name=model.name, total_memory=memory, multi_processor_count=132)
    properties.major, properties.minor = model.capability
    return {
        "is_available": lambda: True,
        "device_count": lambda: 8,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: model.name,
        "get_device_capability": lambda device=None: model.capability,
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: including_emulation or model.has_flash,
        "mem_get_info": lambda device=None: (memory - trace.alive, memory),
        "memory_allocated": lambda device=None: trace.alive,
        "max_memory_allocated": lambda device=None: trace.peak,
        "synchronize": lambda device=None: stream().synchronize(),
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: False,
        "is_initialized": lambda: True,
        "Stream": stream,
        "Event": stream,
        "current_stream": lambda device=None: stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "_is_in_bad_fork": lambda: False,
    }


def _kernels(model: GpuModel, trace: Trace) -> Iterator[tuple[Any, str, Any]]:
    """Yield what to replace: a CPU build decomposes it, or asks the GPU's driver."""
    yield torch._C, "_cuda_getCurrentRawStream", lambda device: 0
    yield torch.Tensor, "record_stream", lambda tensor, stream: None
    for layer in (torch.nn.Linear, torch.nn.Embedding):
        yield layer, "reset_parameters", lambda self: None  # of values, which there are none of
    yield lora, "_kaiming_uniform", lambda shape, dtype, generator: torch.empty(shape, dtype=dtype, device="cpu")
    yield frozen_weights, "_NF4_CHUNK", 1 << 40  # which bounds memory while weights are loaded
    yield torch.UntypedStorage, "resize_", functools.partialmethod(_resize, trace, torch.UntypedStorage.resize_)
    yield torch.Tensor, "pin_memory", lambda tensor, device=None: trace.pin(tensor)
    yield FakeTensor, "tolist", functools.partialmethod(_tolist, trace, FakeTensor.tolist)
    # With the signature of the kernel, which tells whether it supports grouped heads.
    flash = functools.partial(_varlen, model, varlen.varlen_attn)
    yield varlen, "varlen_attn", functools.update_wrapper(flash, varlen.varlen_attn)
    yield F, "rms_norm", trace.as_one_kernel("rms_norm", F.rms_norm)
    yield F, "scaled_dot_product_attention", functools.partial(_sdpa, model, trace, F.scaled_dot_product_attention)
    yield torch.ops.aten, "silu_backward", trace.as_one_kernel("silu_backward", torch.ops.aten.silu_backward)
    yield (
        generate,
        "_causal_mask",
        lambda queries, keys, device: torch.empty(queries, keys, dtype=torch.bool, device=device),
    )
    yield elementwise, "_compiled", lambda function: trace.as_one_kernel(f"compiled {function.__name__}", function)


class _Stream:
    """A stream or an event."""

    trace: Trace

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def synchronize(self) -> None:
        self.trace.waits[f"synchronize at {_project_line()}"] += 1

    def __getattr__(self, name: str) -> Callable[..., "_Stream"]:
        return lambda *args, **options: type(self)()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def _resize(storage: torch.UntypedStorage, trace: Trace, resize: Callable[..., Any], size: int) -> None:
    resize(storage, size)
    trace.resized(storage)


def _tolist(tensor: FakeTensor, trace: Trace, of_cpu: Callable[..., Any]) -> Any:
    if not tensor.is_cuda:
        return of_cpu(tensor)
    trace.waits[f"tolist at {_project_line()}"] += 1
    return [trace.slots_per_expert * (i + 1) for i in range(len(tensor))]


def _varlen(model: GpuModel, kernel: Callable[..., Any], q: torch.Tensor, *args: Any, **options: Any) -> Any:
    if not model.has_flash or q.dtype is torch.float32:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer, in fp16 and bf16.")
    return kernel(q, *args, **options)


def _sdpa(model: GpuModel, trace: Trace, decomposed: Callable[..., torch.Tensor], *args: Any, **options: Any) -> Any:
    """Call the kernel that PyTorch would choose on the GPU."""
    q, k, v = args
    if not q.is_cuda:
        return decomposed(*args, **options)
    causal, mask = options.get("is_causal", False), options.get("attn_mask")
    if mask is not None:
        return trace.as_one_kernel("attention with a mask", decomposed)(*args, **options)
    if model.has_flash and q.dtype is not torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[0]
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, q.requires_grad, 0.0, causal)[0]


def _xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: attention.PackedDocuments) -> torch.Tensor:
    """Call the kernel that xformers calls on a GPU, where the package itself asks for a driver."""
    if q.dtype is torch.float64:
        raise NotImplementedError
    q, k, v = (attention.expand_heads(each, q.shape[1])[None] for each in (q, k, v))
    starts, longest, causal = documents.cu_seqlens, documents.max_length, 1
    kernel = torch.ops.aten._efficient_attention_forward
    return kernel(q, k, v, None, starts, starts, longest, longest, 0.0, causal, q.requires_grad)[0].squeeze(0)
