r"""State in fewer bits: how it is stored, unpacked for a rule, and rounded afterwards.

A rule computes in float32 and knows nothing of this: a piece is unpacked, moved by the rule, and packed again.

``"bf16"`` stores a memory in bfloat16. ``"8bit"`` stores it in blocks of 256 elements, in row-major order, with one
float32 scale for each block: its largest magnitude. With x = element / scale, the leading bits of x as a float32 are
stored, 3 of them mantissa, so that levels are 6 to 12 % apart::

    exp_avg_sq    x, of 2^-32 < x <= 1                        never 0
    exp_avg       s + (1 - s) |x|, s = 1.125 2^-16            and the sign; below s the levels are 2^-19 apart, to 0

The two formats are made for each other. The smallest second memory is about s^2 of its block's largest. So a coordinate
with tiny gradients, whose first memory is rounded up by chance, makes a step of 2^-19 / s, a ninth of that of the
block's largest one. If the second memory could be 0, it would step by m / eps.

Rounding is stochastic and keeps the mean: a value x between its neighbours a < b becomes b with probability
(x - a) / (b - a). Rounded to the nearest, an exp_avg_sq with beta2 = 0.999 would never change again (it changes by a
thousandth, and the levels of bfloat16 are 1/128 to 1/256 apart), nor would a bfloat16 parameter with a step below 1/512
of it. All three formats are leading bits of a float32, so one method rounds all: add random bits below the last bit
kept, and cut. The random bits are a hash of the tensor's step count, its place among the tensors of the step and the
element's index. No generator is used; resumed runs, replicas and tensors cut into pieces are rounded alike.

Sources: block-wise 8-bit state, Dettmers et al. 2022 (https://arxiv.org/abs/2110.02861), who use another map and round
to the nearest; stochastic rounding, Gupta et al. 2015 (https://arxiv.org/abs/1502.02551), for bfloat16 parameters
Zamirai et al. 2020 (https://arxiv.org/abs/2010.06192).
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

# Memories that may be stored in fewer bits, all of the parameter's shape; True: signed.
MEMORIES = {"exp_avg": True, "exp_avg_sq": False}
SMALLEST = 4096  # elements: smaller tensors (biases, norms) take little memory, and stay float32

_DROPPED = {torch.bfloat16: 16, torch.float16: 13}  # bits of a float32's mantissa
_CUT = 20  # bits of its 23 that are cut, so that 3 stay
_TOP = 0x3F800000 >> _CUT  # leading bits of 1.0, the highest code
_LEAST = 1.125 * 2.0**-16  # s: its leading bits are those of 1.0 less 127
GOLDEN = 0x9E3779B1  # 2^32 over the golden ratio, odd


def stored(fresh: dict[str, Tensor], param: Tensor, state_dtype: str | None) -> dict[str, Tensor]:
    """Fresh state, all zeros, in the dtypes that it is stored in; an 8-bit memory gets its scales."""
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
    """Write values of a parameter's memories, given in its shape, into stored ones, rounded to the nearest."""
    batch = {name: t.unsqueeze(0) for name, t in {"param": param.detach(), **made}.items()}
    values = unpack(batch)
    for name, memory in memories.items():
        values[name].copy_(memory.unsqueeze(0))
    pack({name: value for name, value in values.items() if name != "param"}, batch, None)
    return made


def narrow(lists: Mapping[str, list[Tensor]]) -> bool:
    """Whether the parameter or a memory is stored in fewer bits than float32."""
    return any(column[0].element_size() < 4 for name, column in lists.items() if name != "grad")


def unpack(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch as a rule takes it: in float32 (float64 if the parameter is), and without scales."""
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
    """Round a rule's results and write them to where they are stored.

    Args:
        values: what :func:`unpack` made of ``batch``; overwritten.
        batch: of shape (n, ...).
        random: what :func:`noise` gives for these elements, of shape (n, elements); None rounds to the nearest.
    """
    for place, (name, value) in enumerate(values.items()):
        home = batch[name]
        if name == "grad" or value is home:
            continue
        # A product with another odd number for each tensor makes their leading bits independent.
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

    Different steps get independent bits through the seed. Within a tensor one xor-shift suffices, because ``pack``
    multiplies by an odd constant before using the leading bits.
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
    """``x ^ (x >> shift)``, with a logical shift."""
    return x ^ _leading(x.clone(), 32 - shift)


def _signed(word: int) -> int:
    """An unsigned 32-bit number as the int32 of the same bits."""
    return word - (1 << 32) if word >> 31 else word


def _leading(random: Tensor, bits: int) -> Tensor:
    """The leading bits as a non-negative number. Overwrites ``random``."""
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
    """Write the codes and scales of values of shape (n, ...)."""
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
    """Reshape (n, elements) to (n, blocks, BLOCK), padded with zeros."""
    missing = -flat.shape[1] % BLOCK
    return (pad(flat, (0, missing)) if missing else flat).view(len(flat), -1, BLOCK)


def scale_of(name: str) -> str:
    """Name of the tensor with the scales of a memory's blocks."""
    return f"{name}_scale"
