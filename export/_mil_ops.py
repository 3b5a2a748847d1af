"""What the operations of Core ML programs mean, in torch: `MEANING[kind](arguments) -> tensor or several`.

After coremltools' documentation of MIL (opsets iOS 15 to 18). Arguments are tensors, words (str) or, for `values`, lists of tensors; what the file leaves
out has MIL's default. A case whose documentation leaves room (`same` padding with strides) is refused rather than guessed.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Arguments = Mapping[str, Any]
Meaning = Callable[[Arguments], "Tensor | list[Tensor] | tuple[Tensor, ...]"]


def ints(a: Arguments, name: str, default: list[int] | None = None) -> list[int]:
    """A list of whole numbers."""
    return [int(n) for n in a[name].reshape(-1)] if name in a else list(default or [])


def number(a: Arguments, name: str, default: float) -> float:
    return float(a[name]) if name in a else default


def flag(a: Arguments, name: str, default: bool = False) -> bool:
    return bool(a[name]) if name in a else default


def axis(a: Arguments, default: int = -1) -> int:
    return int(a["axis"]) if "axis" in a else default


# --- windows ------------------------------------------------------------------------------------------------------------


def _pads(a: Arguments, dims: int) -> list[int]:
    """before, after of every spatial axis."""
    kind = a.get("pad_type", "valid")
    if kind not in ("valid", "custom"):
        raise ValueError(f"pad_type {kind} is not interpreted")
    return ints(a, "pad", [0] * (2 * dims)) if kind == "custom" else [0] * (2 * dims)


def _torch_pad(pads: list[int]) -> list[int]:
    """MIL's order, first axis first, as torch's, last axis first."""
    return [n for i in range(len(pads) // 2 - 1, -1, -1) for n in pads[2 * i:2 * i + 2]]


def _conv(a: Arguments) -> Tensor:
    x, weight, dims = a["x"], a["weight"], a["x"].ndim - 2
    run = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    pads, ones = _pads(a, dims), [1] * dims
    return run(F.pad(x, _torch_pad(pads)) if any(pads) else x, weight, a.get("bias"), stride=ints(a, "strides", ones),
               dilation=ints(a, "dilations", ones), groups=int(number(a, "groups", 1)))


def _conv_transpose(a: Arguments) -> Tensor:
    x, weight, dims = a["x"], a["weight"], a["x"].ndim - 2
    run = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
    pads, ones = _pads(a, dims), [1] * dims
    whole = run(x, weight, a.get("bias"), stride=ints(a, "strides", ones), dilation=ints(a, "dilations", ones), groups=int(number(a, "groups", 1)))
    wanted = ints(a, "output_shape")[-dims:] if "output_shape" in a else None
    for i in range(dims):  # padding takes away from the whole; an output shape says how much is left behind it
        length = wanted[i] if wanted else whole.shape[2 + i] - pads[2 * i] - pads[2 * i + 1]
        if pads[2 * i] + length > whole.shape[2 + i]:
            raise ValueError("an output shape beyond what the kernel reaches is not interpreted")
        whole = whole.narrow(2 + i, pads[2 * i], length)
    return whole


def _pool(a: Arguments, highest: bool) -> Tensor:
    x, dims = a["x"], a["x"].ndim - 2
    pads, kernel, strides = _pads(a, dims), ints(a, "kernel_sizes"), ints(a, "strides", [1] * dims)
    if flag(a, "ceil_mode"):
        raise ValueError("ceil_mode is not interpreted")
    padded = F.pad(x, _torch_pad(pads), value=-math.inf if highest else 0.0) if any(pads) else x
    if highest:
        return (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1](padded, kernel, strides)
    average = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1]
    mean = average(padded, kernel, strides)
    if any(pads) and flag(a, "exclude_padding_from_average"):
        mean = mean / average(F.pad(torch.ones_like(x), _torch_pad(pads)), kernel, strides)
    return mean


def _pad(a: Arguments) -> Tensor:
    pads, mode = ints(a, "pad"), a.get("mode", "constant")
    if mode == "constant":
        return F.pad(a["x"], _torch_pad(pads), value=number(a, "constant_val", 0.0))
    x, dims = a["x"], len(pads) // 2
    for i in range(dims):
        at, before, after = x.ndim - dims + i, pads[2 * i], pads[2 * i + 1]
        n = x.shape[at]
        place = torch.arange(-before, n + after)
        if mode == "reflect":
            place = (n - 1) - ((n - 1) - place.abs()).abs()
        x = x.index_select(at, place.clamp(0, n - 1))
    return x


def _crop(a: Arguments) -> Tensor:
    x = a["x"]
    for at, (before, after) in ((x.ndim - 2, ints(a, "crop_height")), (x.ndim - 1, ints(a, "crop_width"))):
        x = x.narrow(at, before, x.shape[at] - before - after)
    return x


# --- resizing: documented as grid points on each axis ------------------------------------------------------------------


def _grid(n: int, to: int, mode: str) -> Tensor:
    """Where on 0..n-1 each of `to` samples is taken."""
    i = torch.arange(to, dtype=torch.float64)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if to == 1:
            return torch.tensor([(n - 1) / 2 if mode == "ALIGN_CORNERS" else 0.0], dtype=torch.float64)
        points = i * (n - 1) / (to - 1)
    elif mode == "DEFAULT":
        points = i * n / to
    elif mode == "UNALIGN_CORNERS":
        points = (i + 0.5) * n / to - 0.5
    elif mode == "OFFSET_CORNERS":
        points = (i + 0.5) * max(1, n - 1) / to
    else:
        raise ValueError(f"sampling_mode {mode} is not interpreted")
    return points.clamp(0, n - 1)


def _linear_resize(x: Tensor, sizes: list[int], mode: str) -> Tensor:
    for at, to in zip(range(x.ndim - len(sizes), x.ndim), sizes, strict=True):
        points = _grid(x.shape[at], to, mode)
        low = points.floor().long()
        high = (low + 1).clamp(max=x.shape[at] - 1)
        share = (points - low).to(x.dtype).reshape([-1] + [1] * (x.ndim - 1 - at))
        x = x.index_select(at, low) * (1 - share) + x.index_select(at, high) * share
    return x


def _factors(a: Arguments) -> list[int]:
    return [math.floor(n * number(a, f"scale_factor_{side}", 1)) for n, side in zip(a["x"].shape[-2:], ("height", "width"), strict=True)]


def _upsample_nearest(a: Arguments) -> Tensor:
    x = a["x"]
    for at, to in zip((x.ndim - 2, x.ndim - 1), _factors(a), strict=True):
        x = x.index_select(at, torch.arange(to) * x.shape[at] // to)
    return x


def _resize(a: Arguments) -> Tensor:
    if a.get("interpolation_mode", "LINEAR") != "LINEAR":
        raise ValueError("resize to the nearest is not interpreted")
    count = int(a["resized_dims"])
    given, own = ints(a, "shape")[-count:], list(a["x"].shape[-count:])
    return _linear_resize(a["x"], [n or m for n, m in zip(given, own, strict=True)], a.get("sampling_mode", "DEFAULT"))


# --- normalisation, attention, activations -----------------------------------------------------------------------------


def _layer_norm(a: Arguments) -> Tensor:
    x = a["x"]
    axes = [n % x.ndim for n in ints(a, "axes", list(range(x.ndim)))]
    mean = x.mean(axes, keepdim=True)
    out = (x - mean) / ((x - mean).square().mean(axes, keepdim=True) + number(a, "epsilon", 1e-5)).sqrt()
    shape = [x.shape[i] if i in axes else 1 for i in range(x.ndim)]
    out = out * a["gamma"].reshape(shape) if "gamma" in a else out
    return out + a["beta"].reshape(shape) if "beta" in a else out


def _batch_norm(a: Arguments) -> Tensor:
    return F.batch_norm(a["x"], a["mean"], a["variance"], a.get("gamma"), a.get("beta"), eps=number(a, "epsilon", 1e-5))


def _instance_norm(a: Arguments) -> Tensor:
    return F.instance_norm(a["x"], weight=a.get("gamma"), bias=a.get("beta"), eps=number(a, "epsilon", 1e-5))


def _l2_norm(a: Arguments) -> Tensor:
    return a["x"] / (a["x"].square().sum((-3, -2, -1), keepdim=True) + number(a, "epsilon", 1e-6)).sqrt()


def _gelu(a: Arguments) -> Tensor:
    mode = a.get("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return a["x"] * torch.sigmoid(1.702 * a["x"])
    return F.gelu(a["x"], approximate={"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[mode])


def _matmul(a: Arguments) -> Tensor:
    x, y = (a[k].transpose(-1, -2) if flag(a, f"transpose_{k}") else a[k] for k in "xy")
    return x @ y


def _attention(a: Arguments) -> Tensor:
    return F.scaled_dot_product_attention(a["query"], a["key"], a["value"], attn_mask=a.get("attn_mask"))


def _prelu(a: Arguments) -> Tensor:
    return F.prelu(a["x"], a["alpha"])


# --- shapes -----------------------------------------------------------------------------------------------------------


def _reshape(a: Arguments) -> Tensor:
    own, wanted = list(a["x"].shape), ints(a, "shape")
    for back in range(1, len(wanted) + 1):  # iOS 17: a 0 takes the length of the axis as far from the end, and 1 beyond the first
        if wanted[-back] == 0:
            wanted[-back] = own[-back] if back <= len(own) else 1
    return a["x"].reshape(wanted)


def _expand_dims(a: Arguments) -> Tensor:
    x, axes = a["x"], ints(a, "axes")
    rank = x.ndim + len(axes)
    for at in sorted(n % rank for n in axes):
        x = x.unsqueeze(at)
    return x


def _squeeze(a: Arguments) -> Tensor:
    x = a["x"]
    axes = [n % x.ndim for n in ints(a, "axes")] if "axes" in a else [i for i, n in enumerate(x.shape) if n == 1]
    if any(x.shape[i] != 1 for i in axes):
        raise ValueError("squeeze of an axis that is longer than 1")
    return x.reshape([n for i, n in enumerate(x.shape) if i not in axes])


def _slice_by_index(a: Arguments) -> Tensor:
    x, rank = a["x"], a["x"].ndim
    begin, end, stride = ints(a, "begin"), ints(a, "end"), ints(a, "stride", [1] * rank)
    masks = {k: [bool(v) for v in a[k].reshape(-1)] if k in a else [False] * rank for k in ("begin_mask", "end_mask", "squeeze_mask")}
    picks: list[Any] = []
    for i in range(rank):
        first = None if masks["begin_mask"][i] else begin[i]
        if masks["squeeze_mask"][i]:
            picks.append(torch.tensor([first or 0]) % x.shape[i])
        else:
            picks.append(torch.tensor(range(x.shape[i])[first:None if masks["end_mask"][i] else end[i]:stride[i]], dtype=torch.long))
    for i, pick in enumerate(picks):
        x = x.index_select(i, pick)
    return x.reshape([n for i, n in enumerate(x.shape) if not masks["squeeze_mask"][i]])


def _slice_by_size(a: Arguments) -> Tensor:
    x = a["x"]
    for i, (first, size) in enumerate(zip(ints(a, "begin"), ints(a, "size"), strict=True)):
        x = x.narrow(i, first, x.shape[i] - first if size == -1 else size)
    return x


def _concat(a: Arguments) -> Tensor:
    values, at = a["values"], axis(a)
    if not flag(a, "interleave"):
        return torch.cat([v.reshape(-1) if v.ndim == 0 else v for v in values], at)
    at %= values[0].ndim
    return torch.stack(values, at + 1).flatten(at, at + 1)


def _split(a: Arguments) -> tuple[Tensor, ...]:
    sizes = ints(a, "split_sizes")
    return a["x"].split(sizes or a["x"].shape[axis(a)] // int(a["num_splits"]), axis(a))


def _gather(a: Arguments) -> Tensor:
    x, indices, at, batch = a["x"], a["indices"].long(), axis(a, 0) % a["x"].ndim, int(number(a, "batch_dims", 0))
    if batch:
        raise ValueError("gather with batch_dims is not interpreted")
    indices = torch.where(indices < 0, indices + x.shape[at], indices)
    return x.index_select(at, indices.reshape(-1)).reshape((*x.shape[:at], *indices.shape, *x.shape[at + 1:]))


def _gather_nd(a: Arguments) -> Tensor:
    if number(a, "batch_dims", 0):
        raise ValueError("gather_nd with batch_dims is not interpreted")
    return a["x"][tuple(a["indices"].long().unbind(-1))]


def _depth_to_space(a: Arguments) -> Tensor:
    n, c, h, w = a["x"].shape
    block = int(a["block_size"])  # unlike pixel_shuffle, the block's axes come before the channels
    return a["x"].reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // block**2, h * block, w * block)


def _shape(a: Arguments) -> Tensor:
    return torch.tensor(a["x"].shape, dtype=torch.long)


def _fill(a: Arguments) -> Tensor:
    value = a.get("value", torch.tensor(0.0))
    return torch.full(ints(a, "shape"), value.item(), dtype=value.dtype)


def _fill_like(a: Arguments) -> Tensor:
    value = a.get("value", torch.tensor(0.0))
    return torch.full(a["ref_tensor"].shape, value.item(), dtype=value.dtype)


def _reduce(what: Callable[[Tensor, list[int], bool], Tensor]) -> Meaning:
    def meaning(a: Arguments) -> Tensor:
        axes = ints(a, "axes") or list(range(a["x"].ndim))
        return what(a["x"], [n % a["x"].ndim for n in axes], flag(a, "keep_dims"))
    return meaning


def _reduce_arg(what: Callable[..., Tensor]) -> Meaning:
    return lambda a: what(a["x"], dim=axis(a), keepdim=flag(a, "keep_dims"))


# --- integers ---------------------------------------------------------------------------------------------------------


def _along(a: Arguments, name: str, data: Tensor) -> Tensor:
    """A scale or zero point, which is one number or one for each place on `axis`."""
    value = a.get(name, torch.tensor(0.0)).float()
    if value.ndim == 0 or value.numel() == 1:
        return value.reshape(())
    at = axis(a, 0) % data.ndim
    return value.reshape([-1 if i == at else 1 for i in range(data.ndim)])


def _quantize(a: Arguments) -> Tensor:
    x, (least, most) = a["input"], {"int8": (-128, 127), "uint8": (0, 255)}[a["output_dtype"]]
    return (torch.round(x / _along(a, "scale", x)) + _along(a, "zero_point", x)).clamp(least, most).long()


def _dequantize(a: Arguments, key: str = "input") -> Tensor:
    data = a[key].float()
    return (data - _along(a, "zero_point", data)) * _along(a, "scale", data)


def _lut_to_dense(a: Arguments) -> Tensor:
    """iOS 16: indices packed from the lowest bit up, one palette for the whole tensor."""
    lut, shape = a["lut"], ints(a, "shape")
    if lut.ndim != 1:
        raise ValueError("a palette for each group of channels is not interpreted")
    bits = round(math.log2(lut.numel()))
    stream = (a["indices"].reshape(-1, 1) >> torch.arange(8)) & 1
    codes = (stream.reshape(-1)[:math.prod(shape) * bits].reshape(-1, bits) << torch.arange(bits)).sum(1)
    return lut[codes].reshape(shape)


def _of(what: Callable[..., Tensor], *names: str) -> Meaning:
    return lambda a: what(*(a[n] for n in names))


def _real_div(a: Arguments) -> Tensor:
    whole = not (a["x"].is_floating_point() or a["y"].is_floating_point())
    return torch.div(a["x"], a["y"], rounding_mode="trunc" if whole else None)


BINARY: dict[str, Callable[..., Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "floor_div": torch.floor_divide, "mod": torch.remainder, "pow": torch.pow,
    "maximum": torch.maximum, "minimum": torch.minimum, "equal": torch.eq, "not_equal": torch.ne, "greater": torch.gt, "greater_equal": torch.ge,
    "less": torch.lt, "less_equal": torch.le, "logical_and": torch.logical_and, "logical_or": torch.logical_or, "logical_xor": torch.logical_xor}
UNARY: dict[str, Callable[..., Tensor]] = {
    "abs": torch.abs, "ceil": torch.ceil, "floor": torch.floor, "round": torch.round, "sin": torch.sin, "cos": torch.cos, "tan": torch.tan,
    "tanh": torch.tanh, "erf": torch.erf, "exp": torch.exp, "exp2": torch.exp2, "sqrt": torch.sqrt, "square": torch.square, "sign": torch.sign,
    "logical_not": torch.logical_not, "relu": torch.relu, "relu6": F.relu6, "sigmoid": torch.sigmoid, "silu": F.silu, "softplus": F.softplus,
    "softsign": F.softsign, "identity": lambda x: x, "cast": lambda x: x}
MEANING: dict[str, Meaning] = {
    **{k: _of(f, "x", "y") for k, f in BINARY.items()}, **{k: _of(f, "x") for k, f in UNARY.items()}, "real_div": _real_div,
    "rsqrt": lambda a: (a["x"] + number(a, "epsilon", 1e-12)).rsqrt(), "inverse": lambda a: 1 / (a["x"] + number(a, "epsilon", 1e-4)),
    "log": lambda a: (a["x"] + number(a, "epsilon", 1e-45)).log(), "clip": lambda a: a["x"].clamp(number(a, "alpha", -math.inf), number(a, "beta", math.inf)),
    "threshold": lambda a: a["x"].clamp(min=number(a, "alpha", 0.0)), "gelu": _gelu, "prelu": _prelu,
    "leaky_relu": lambda a: F.leaky_relu(a["x"], number(a, "alpha", 0.01)), "elu": lambda a: F.elu(a["x"], number(a, "alpha", 1.0)),
    "sigmoid_hard": lambda a: (number(a, "alpha", 0.2) * a["x"] + number(a, "beta", 0.5)).clamp(0, 1),
    "thresholded_relu": lambda a: torch.where(a["x"] >= number(a, "alpha", 1.0), a["x"], torch.zeros_like(a["x"])),
    "clamped_relu": lambda a: F.leaky_relu(a["x"], number(a, "alpha", 0.0)).clamp(max=number(a, "beta", math.inf)),
    "linear_activation": lambda a: number(a, "alpha", 1.0) * a["x"] + number(a, "beta", 0.0), "softmax": lambda a: a["x"].softmax(axis(a)),
    "linear": lambda a: F.linear(a["x"], a["weight"], a.get("bias")), "matmul": _matmul, "scaled_dot_product_attention": _attention,
    "einsum": lambda a: torch.einsum(a["equation"], *a["values"]),
    "conv": _conv, "conv_transpose": _conv_transpose, "max_pool": lambda a: _pool(a, True), "avg_pool": lambda a: _pool(a, False),
    "layer_norm": _layer_norm, "batch_norm": _batch_norm, "instance_norm": _instance_norm, "l2_norm": _l2_norm,
    "upsample_bilinear": lambda a: _linear_resize(a["x"], _factors(a), "STRICT_ALIGN_CORNERS" if flag(a, "align_corners", True) else "UNALIGN_CORNERS"),
    "resize_bilinear": lambda a: _linear_resize(a["x"], [int(number(a, f"target_size_{s}", 1)) for s in ("height", "width")], a.get("sampling_mode", "DEFAULT")),
    "upsample_nearest_neighbor": _upsample_nearest, "resize": _resize, "pad": _pad, "crop": _crop,
    "reshape": _reshape, "transpose": lambda a: a["x"].permute(ints(a, "perm")), "expand_dims": _expand_dims, "squeeze": _squeeze,
    "slice_by_index": _slice_by_index, "slice_by_size": _slice_by_size, "concat": _concat, "stack": lambda a: torch.stack(a["values"], axis(a)), "split": _split,
    "gather": _gather, "gather_nd": _gather_nd, "gather_along_axis": lambda a: torch.gather(a["x"], axis(a, 0), a["indices"].long()),
    "select": lambda a: torch.where(a["cond"], a["a"], a["b"]), "tile": lambda a: a["x"].repeat(ints(a, "reps")), "shape": _shape,
    "fill": _fill, "fill_like": _fill_like, "range_1d": lambda a: torch.arange(a["start"].item(), a["end"].item(), a["step"].item()),
    "reverse": lambda a: a["x"].flip(ints(a, "axes", list(range(a["x"].ndim)))), "cumsum": lambda a: a["x"].cumsum(axis(a, 0)),
    "pixel_shuffle": lambda a: F.pixel_shuffle(a["x"], int(a["upscale_factor"])), "depth_to_space": _depth_to_space,
    "pixel_unshuffle": lambda a: F.pixel_unshuffle(a["x"], int(a["downscale_factor"])),
    "reduce_mean": _reduce(lambda x, d, k: x.mean(d, keepdim=k)), "reduce_sum": _reduce(lambda x, d, k: x.sum(d, keepdim=k)),
    "reduce_max": _reduce(lambda x, d, k: x.amax(d, keepdim=k)), "reduce_min": _reduce(lambda x, d, k: x.amin(d, keepdim=k)),
    "reduce_sum_square": _reduce(lambda x, d, k: x.square().sum(d, keepdim=k)), "reduce_l1_norm": _reduce(lambda x, d, k: x.abs().sum(d, keepdim=k)),
    "reduce_l2_norm": _reduce(lambda x, d, k: x.square().sum(d, keepdim=k).sqrt()),
    "reduce_log_sum_exp": _reduce(lambda x, d, k: x.logsumexp(d, keepdim=k)), "reduce_argmax": _reduce_arg(torch.argmax), "reduce_argmin": _reduce_arg(torch.argmin),
    "quantize": _quantize, "dequantize": _dequantize, "constexpr_affine_dequantize": lambda a: _dequantize(a, "quantized_data"),
    "constexpr_lut_to_dense": _lut_to_dense, "constexpr_cast": lambda a: a["source_val"]}
