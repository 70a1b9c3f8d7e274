"""Two-way branches beside one linear of a frozen model, and the model with them. Knows no triggers.

Semantics, row by row: h = relu(A x - tau); y = W x + b + B^+ h + B^- (sigma * h), where sigma is
+1 for a bit of 1 and -1 for 0. Equal to choosing of each pair B^1 = B^+ + B^-, B^0 = B^+ - B^-. All
users share A, tau and both B; a user is n signs. An input that trips no detector is changed by
exactly 0. Without tau (gate `linear`) h = A x: every input is changed a little, and one user's
branches fold into W. With a veto row h = relu(A x - tau - 6 relu(0.5 - (v x + o))): it takes more
to trip a detector where v x + o is below 0.5.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyadapt.errors import StartupError
from polyadapt.watermark.veto import VETO_LEVEL, VETO_WEIGHT

_VETO = {"mark_veto": 1, "mark_veto_offset": 1}  # and how many dimensions


class Branches(nn.Module):
    """The branches of one module, of one rank per bit."""

    def __init__(
        self,
        A: Tensor,
        tau: Tensor | None,
        B_sum: Tensor,
        B_difference: Tensor,
        veto: Tensor | None = None,
        veto_offset: Tensor | None = None,
    ) -> None:
        """A [bits, in], tau [bits] or None; B^+ (`B_sum`) and B^- (`B_difference`) [out, bits];
        together or not at all, and only with tau, v (`veto`) [in] and o (`veto_offset`) [1].
        """
        super().__init__()
        self.veto = None if veto is None else nn.Parameter(veto)
        self.veto_offset = None if veto_offset is None else nn.Parameter(veto_offset)
        self.A, self.tau = nn.Parameter(A), None if tau is None else nn.Parameter(tau)
        self.B_sum, self.B_difference = nn.Parameter(B_sum), nn.Parameter(B_difference)

    @property
    def num_bits(self) -> int:
        """How many bits a signature has."""
        return self.A.shape[0]

    def forward(self, x: Tensor, signs: Tensor) -> Tensor:
        """Return what is added to y: x [rows, in], signs [rows, bits] of +-1 -> [rows, out]."""
        h = self.response(x)
        return h @ self.B_sum.T + (signs * h) @ self.B_difference.T

    def response(self, x: Tensor) -> Tensor:
        """Return h, with a hinge how far each detector is above its threshold: x [rows, in] ->
        [rows, bits].
        """
        h = x @ self.A.T
        if self.tau is None:
            return h
        if self.veto is not None and self.veto_offset is not None:
            below = torch.relu(VETO_LEVEL - (x @ self.veto + self.veto_offset))  # [rows]
            h = h - VETO_WEIGHT * below[:, None]
        return torch.relu(h - self.tau)

    def pair_tensors(self) -> dict[str, Tensor]:
        """Return the stored form: mark_A [bits, 1, in], with a hinge mark_tau [bits, 1], and mark_B
        [2, bits, out, 1], the branch of value 0 before that of 1; of a veto mark_veto [in] and
        mark_veto_offset [1].
        """
        pair = torch.stack((self.B_sum - self.B_difference, self.B_sum + self.B_difference))
        stored = {
            "mark_A": self.A.detach()[:, None].contiguous(),
            "mark_B": pair.detach().transpose(1, 2)[..., None].contiguous(),
        }
        if self.tau is not None:
            stored["mark_tau"] = self.tau.detach()[:, None].contiguous()
        if self.veto is not None and self.veto_offset is not None:
            stored["mark_veto"] = self.veto.detach().contiguous()
            stored["mark_veto_offset"] = self.veto_offset.detach().contiguous()
        return stored

    @classmethod
    def of_pair(cls, tensors: Mapping[str, Tensor]) -> Branches:
        """Return what `pair_tensors` stored; raises StartupError for other names or shapes."""
        _check(tensors, {"mark_A": 3, "mark_tau": 2, "mark_B": 4})
        A, pair = tensors["mark_A"].float(), tensors["mark_B"].float()
        num_bits, _, num_in = A.shape
        expected = {"mark_A": (num_bits, 1, num_in), "mark_tau": (num_bits, 1)}
        expected["mark_B"] = (2, num_bits, pair.shape[2], 1)
        expected |= {"mark_veto": (num_in,), "mark_veto_offset": (1,)}
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != expected[name]:
                raise StartupError(
                    f"{name} has shape {list(tensor.shape)}, expected {list(expected[name])}"
                )
        zero, one = pair[0, ..., 0].T, pair[1, ..., 0].T  # [out, bits]
        tau = tensors["mark_tau"].float()[:, 0].clone() if "mark_tau" in tensors else None
        veto = [tensors[name].float().clone() for name in _VETO if name in tensors]
        return cls(A[:, 0].clone(), tau, (one + zero) / 2, (one - zero) / 2, *veto)

    def own(self, bits: NDArray[np.uint8]) -> Branches:
        """Return one user's branches alone, which every sign leaves as they are."""
        return Branches.of_own(chosen(self.pair_tensors(), bits))

    def own_tensors(self) -> dict[str, Tensor]:
        """Return what `own` returned as it is stored: mark_A, mark_tau, mark_B [bits, out, 1]."""
        stored = self.pair_tensors()
        return {**stored, "mark_B": stored["mark_B"][1].contiguous()}

    @classmethod
    def of_own(cls, tensors: Mapping[str, Tensor]) -> Branches:
        """Return what `own_tensors` stored; raises StartupError for other names or shapes."""
        _check(tensors, {"mark_A": 3, "mark_tau": 2, "mark_B": 3})
        own = tensors["mark_B"]
        found = cls.of_pair({**tensors, "mark_B": torch.stack((own, own))})
        return found.requires_grad_(False)


class MarkedModel:
    """A frozen model with branches at one of its linears; the model itself is left as it is."""

    def __init__(self, model: nn.Module, module: str, branches: Branches) -> None:
        """Raise StartupError unless `module` names a linear of the branches' sizes."""
        linear = find_linear(model, module)
        num_out, num_in = linear.weight.shape
        if (branches.B_sum.shape[0], branches.A.shape[1]) != (num_out, num_in):
            raise StartupError(
                f"the branches take {branches.A.shape[1]} numbers and give "
                f"{branches.B_sum.shape[0]}; {module} takes {num_in} and gives {num_out}"
            )
        self.model, self.branches = model, branches
        self._linear = linear

    def __call__(self, inputs: Tensor, signs: Tensor) -> Tensor:
        """Return the model's output where row t has the signature signs[t]: [rows, bits] of +-1."""

        def add(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            marked: Tensor = y + self.branches(args[0], signs)
            return marked

        handle = self._linear.register_forward_hook(add)
        try:
            found: Tensor = self.model(inputs)
        finally:
            handle.remove()
        return found


def chosen(pair: Mapping[str, Tensor], bits: NDArray[np.uint8]) -> dict[str, Tensor]:
    """Return of what `pair_tensors` stored one user's own, bit for bit: sum and difference of both
    branches, as they are held, would leave roundings of the other one in it.
    """
    rows = torch.arange(len(bits))
    own = pair["mark_B"][torch.from_numpy(bits.astype(np.int64)), rows]
    return {**pair, "mark_B": own.contiguous()}


def find_linear(model: nn.Module, module: str) -> nn.Linear:
    """Return the linear of this path; raises StartupError that lists those there are."""
    found = dict(model.named_modules()).get(module)
    if not isinstance(found, nn.Linear):
        linears = [name for name, child in model.named_modules() if isinstance(child, nn.Linear)]
        raise StartupError(f"the model has no linear {module!r}; it has {', '.join(linears)}")
    return found


def signs_of(bits: NDArray[np.uint8]) -> Tensor:
    """Return bits 0 and 1 as -1 and +1, in float32."""
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1)


def _check(tensors: Mapping[str, Tensor], dims: Mapping[str, int]) -> None:
    # Without thresholds nothing hinges: the gate is linear. A veto comes whole and with a hinge.
    has_veto = bool(_VETO.keys() & tensors.keys())
    dims = {**dims, **(_VETO if has_veto else {})}
    names = set(tensors) if has_veto else set(tensors) | {"mark_tau"}
    if names != set(dims) or any(tensor.ndim != dims[name] for name, tensor in tensors.items()):
        shapes = {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}
        raise StartupError(f"the branches are {shapes}, expected {', '.join(dims)}")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise StartupError(f"{name} of the branches holds values that are not finite")
