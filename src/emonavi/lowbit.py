r"""Fewer bits: how state is stored, how a rule sees it, and how what it wrote is rounded.

A rule computes in float32 and knows nothing of this: a piece is unpacked, moved by the rule, and packed again.

``"bf16"`` keeps a memory in bfloat16. ``"8bit"`` keeps it in blocks of 256 elements, in the order of the shape, with
one float32 scale for each block: its largest magnitude. An element over its scale, x, is stored as the leading bits of
a float32, 3 of them mantissa, so that levels lie 6 to 12 % apart::

    exp_avg_sq    x, of 2^-32 < x <= 1                        never 0
    exp_avg       s + (1 - s) |x|, s = 1.125 2^-16            and the sign; below s the levels are 2^-19 apart, to 0

The two belong together: the least second memory is about s^2 of its block's largest, so that a coordinate whose first
memory only chance rounds up from next to nothing makes a step of 2^-19 / s = a ninth of that of the block's largest,
however small its gradients are. Beside a second memory of 0 it would step by m / eps.

Rounding is at random, up with the probability that keeps the mean: a value x between its neighbours a < b becomes b
with probability (x - a) / (b - a). To the nearest, an exp_avg_sq with beta2 = 0.999 would never move again (it changes
by a thousandth, and bfloat16 has levels 1/128 to 1/256 apart), nor would a bfloat16 parameter whose step is below 1/512
of it. All three formats are leading bits of a float32, so that the rounding is one: add random bits below the last bit
that is kept, and cut. The random bits are a hash of the tensor's step count, its place among the tensors of the step
and the element's index: no generator is touched, and a resumed run rounds alike, as do replicas, however tensors are
cut.

Sources: block-wise 8-bit state, Dettmers et al. 2022 (https://arxiv.org/abs/2110.02861), there with another map and to
the nearest; stochastic rounding, Gupta et al. 2015 (https://arxiv.org/abs/1502.02551), for bfloat16 parameters Zamirai
et al. 2020 (https://arxiv.org/abs/2010.06192).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from emonavi.pieces import BLOCK

__all__ = [
    *("GOLDEN", "MEMORIES", "SMALLEST", "filled", "narrow", "noise", "pack", "scale_of", "seeds", "stored", "unpack")
]

# The memories that may be stored in fewer bits, all of the parameter's shape, and whether they have a sign.
MEMORIES = {"exp_avg": True, "exp_avg_sq": False}
SMALLEST = 4096  # elements: smaller tensors (biases, norms) weigh nothing, and keep float32

_DROPPED = {torch.bfloat16: 16, torch.float16: 13}  # bits of a float32's mantissa
_CUT = 20  # of its 23, so that 3 are kept
_TOP = 0x3F800000 >> _CUT  # leading bits of 1.0, the highest code
_LEAST = 1.125 * 2.0**-16  # s: its leading bits are those of 1.0 less 127
GOLDEN = 0x9E3779B1  # 2^32 over the golden ratio, odd


def stored(fresh: dict[str, Tensor], param: Tensor, state_dtype: str | None) -> dict[str, Tensor]:
    """Fresh state, all zeros, as it is to be stored: an 8-bit memory has its scales beside it."""
    if state_dtype is None or param.numel() < SMALLEST:
        return fresh
    kept: dict[str, Tensor] = {}
    for name, zeros in fresh.items():
        if name not in MEMORIES:
            kept[name] = zeros
        elif state_dtype == "bf16":
            kept[name] = zeros.to(torch.bfloat16)
        else:
            kept[name] = torch.zeros(param.shape, dtype=torch.uint8, device=param.device)
            kept[scale_of(name)] = zeros.new_zeros(-(-param.numel() // BLOCK), dtype=torch.float32)
    return kept


def filled(made: dict[str, Tensor], param: Tensor, memories: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stored memories of a parameter, with the given values, of its shape, written into them to the nearest."""
    batch = {name: t.unsqueeze(0) for name, t in {"param": param.detach(), **made}.items()}
    values = unpack(batch)
    for name, memory in memories.items():
        values[name].copy_(memory.unsqueeze(0))
    pack({name: value for name, value in values.items() if name != "param"}, batch, None)
    return made


def narrow(lists: Mapping[str, list[Tensor]]) -> bool:
    """Whether anything that a rule writes is stored in fewer bits than float32."""
    return any(column[0].element_size() < 4 for name, column in lists.items() if name != "grad")


def unpack(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch as a rule takes it: in float32, or in float64 where the parameter is, and without scales."""
    values: dict[str, Tensor] = {}
    dtype = torch.promote_types(batch["param"].dtype, torch.float32)
    for name, tensor in batch.items():
        scale = batch.get(scale_of(name))
        if scale is not None:
            values[name] = _decode(tensor, scale, signed=MEMORIES[name]).to(dtype)
        elif not name.endswith("_scale"):
            values[name] = tensor.to(dtype)
    return values


def pack(values: Mapping[str, Tensor], batch: Mapping[str, Tensor], random: Tensor | None) -> None:
    """Write what a rule has written back to where it is stored.

    Args:
        values: what :func:`unpack` made of ``batch``; of no use afterwards.
        batch: of shape (n, ...).
        random: what :func:`noise` gives for these elements, of shape (n, elements); None rounds to the nearest.
    """
    for place, (name, value) in enumerate(values.items()):
        home = batch[name]
        if name == "grad" or value is home:
            continue
        # The leading bits of products with odd numbers that have nothing to do with each other.
        own = None if random is None else random * _signed(pow(GOLDEN, place + 2, 1 << 32))
        scale = batch.get(scale_of(name))
        if scale is not None:
            _encode(value.float(), home, scale, own, signed=MEMORIES[name])
        elif own is None or home.dtype not in _DROPPED:
            home.copy_(value)
        else:
            dropped = _DROPPED[home.dtype]
            bits = value.float().view(torch.int32)
            bits = bits.add_(_leading(own, dropped).view(bits.shape)).bitwise_and_(-1 << dropped)
            home.copy_(bits.view(torch.float32))


def seeds(steps: Tensor, places: Tensor) -> Tensor:
    """Seeds of the tensors of a step, int32, from the step count of each and its place in the step (1-D)."""
    return _mix(_mix(steps.to(torch.int32)) + places.to(torch.int32))


def noise(seeds: Tensor, start: int, count: int) -> Tensor:
    """Random bits for each of ``count`` elements from index ``start`` on: int32, of shape (n, count).

    From step to step an element's bits are as random as the seeds. Among neighbours one round has to do; it is complete
    only when the bits are multiplied by an odd number, so that the leading ones depend on all.
    """
    index = torch.arange(count, device=seeds.device).to(torch.int32)
    first = seeds + _signed(start * GOLDEN % (1 << 32))
    return _folded(torch.add(first[:, None], index, alpha=_signed(GOLDEN)), 15)


def _mix(x: Tensor) -> Tensor:
    """A bijection of int32 in which each bit depends on all."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = _folded(x, shift) * _signed(factor)
    return _folded(x, 16)


def _folded(x: Tensor, shift: int) -> Tensor:
    """The bits xor those ``shift`` places higher up."""
    return x ^ _leading(x.clone(), 32 - shift)


def _signed(word: int) -> int:
    """An unsigned word as int32 has it."""
    return word - (1 << 32) if word >> 31 else word


def _leading(random: Tensor, bits: int) -> Tensor:
    """The leading bits as a number of at least 0. Writes to ``random``."""
    return random.bitwise_right_shift_(32 - bits).bitwise_and_((1 << bits) - 1)


def _decode(codes: Tensor, scale: Tensor, *, signed: bool) -> Tensor:
    """Values of codes of shape (n, ...) with scales of shape (n, blocks)."""
    code = codes.flatten(1).to(torch.int32)
    if signed:
        level = ((code & 127) + (_TOP - 127) << _CUT).view(torch.float32).sub_(_LEAST)
        level = (level.view(torch.int32) | (code & 128) << 24).view(torch.float32)
        scale = scale / (1 - _LEAST)
    else:
        level = (code + (_TOP - 255) << _CUT).view(torch.float32)
    values = _blocks(level) * scale[..., None]
    return values.flatten(1)[:, : code.shape[1]].reshape(codes.shape)


def _encode(values: Tensor, codes: Tensor, scale: Tensor, random: Tensor | None, *, signed: bool) -> None:
    """Write codes and scales of values of shape (n, ...)."""
    flat = values.flatten(1).contiguous()
    sizes = _blocks(flat).abs() if signed else _blocks(flat)
    torch.amax(sizes, 2, out=scale)
    level = (sizes / scale.masked_fill(scale == 0, 1.0)[..., None]).flatten(1)[:, : flat.shape[1]].contiguous()
    if signed:
        level.mul_(1 - _LEAST).add_(_LEAST)
    code = level.view(torch.int32)
    code += 1 << (_CUT - 1) if random is None else _leading(random, _CUT)
    code >>= _CUT
    code -= _TOP - (127 if signed else 255)
    if signed:
        code |= flat.view(torch.int32) >> 24 & 128
    codes.copy_(code.clamp_(min=0).view(codes.shape))


def _blocks(flat: Tensor) -> Tensor:
    """Shape (n, elements) as (n, blocks, BLOCK), zeros at the end."""
    missing = -flat.shape[1] % BLOCK
    return (pad(flat, (0, missing)) if missing else flat).view(len(flat), -1, BLOCK)


def scale_of(name: str) -> str:
    """Name of the scales of a memory's blocks, where it has any."""
    return f"{name}_scale"
