"""One user's branches so intertwined with the weights that taking them out costs accuracy.

Subtract and carry: the weights are given up by a random part C, the branches bring it back. What is
handed over computes what the plain copy does, under every signature; without its branches it lacks
C. It stops whoever cuts a branch off, not whoever has the copy's functions added up: a merged copy,
one that was trained on the answers, or one whose branches were understood is beyond it. Knows no
triggers and no keys; the caller gives the randomness.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from polyadapt.errors import InvalidRequest, StartupError
from polyadapt.watermark.branches import Branches, find_linear

# The precision of bfloat16 suffers above it: 4e-3 of a layer's output at 1, 2.4e-3 without.
MAX_STRENGTH = 4.0


def merge(model: nn.Sequential, module: str, own: Branches) -> nn.Sequential:
    """Return the copy as an ordinary model: W + B A. Raises InvalidRequest for a hinge, whose
    branches are no matrix.
    """
    if own.tau is not None:
        raise InvalidRequest(
            "a hinge is not linear and cannot be folded into the weights; give the form bundle, or "
            "expanded, where the branches become a layer of their own",
            param="form",
        )
    linear = find_linear(model, module)
    return _with(model, module, linear.weight + own.B_sum @ own.A, linear.bias)


def obfuscate(
    model: nn.Sequential,
    module: str,
    own: Branches,
    strength: float,
    rng: np.random.Generator,
) -> tuple[nn.Sequential, Branches]:
    """Return the model without C, and branches that bring it back: y = (W - C) x + (B h + C x).

    C = P Q is random, of the rank of the branches and of `strength` times the Frobenius norm of W.
    A linear branch is carried in the same matrices and both are mixed by a random invertible one.
    What hinges cannot be mixed: z = relu(z) - relu(-z) makes C two units of each row, and
    B relu(z) = B z + B relu(-z) moves the linear part of every detector into the weights too, so
    that what stays beside them is at work on ordinary inputs and silent on triggers. Rows are
    scaled and shuffled. Raises InvalidRequest for a strength outside 0 to MAX_STRENGTH.
    """
    linear = find_linear(model, module)
    size = own.num_bits
    P, Q = _draw(linear.weight, size, strength, rng)
    weight = linear.weight - P @ Q
    if own.tau is None:
        return _with(model, module, weight, linear.bias), _mixed(own, P, Q, rng)
    flipped, constant = own.B_sum @ own.A, own.B_sum @ own.tau
    rows = torch.cat([-own.A, Q, -Q])
    thresholds = torch.cat([-own.tau, torch.zeros(2 * size)])
    written = torch.cat([own.B_sum, P, -P], 1)
    hidden = _with(model, module, weight + flipped, linear.bias - constant)
    return hidden, _shuffled(rows, thresholds, written, rng)


def expand(
    model: nn.Sequential, module: str, own: Branches, rng: np.random.Generator
) -> nn.Sequential:
    """Return the copy of a hinge mark as an ordinary stack of Linear and ReLU, of one layer more.

    The marked linear itself goes through units, W x = W R^T (relu(R x) - relu(-R x)) with R a
    random rotation, among which the detectors stand as in `obfuscate`: there is no branch to cut
    off. It costs in + out multiply-adds for each of 2 in + bits units in place of in * out.
    """
    if own.tau is None:
        raise InvalidRequest("linear branches fold into the weights; give the form merged")
    linear = find_linear(model, module)
    R, _ = torch.linalg.qr(_normal(rng, linear.in_features, linear.in_features))
    carried = (linear.weight + own.B_sum @ own.A) @ R.T
    units = _shuffled(
        torch.cat([-own.A, R, -R]),
        torch.cat([-own.tau, torch.zeros(2 * linear.in_features)]),
        torch.cat([own.B_sum, carried, -carried], 1),
        rng,
    )
    assert units.tau is not None
    into = _linear(units.A, -units.tau)
    out_of = _linear(units.B_sum, linear.bias - own.B_sum @ own.tau)
    layers: list[nn.Module] = []
    for name, layer in model.named_children():
        layers += [into, nn.ReLU(), out_of] if name == module else [layer]
    return nn.Sequential(*layers).requires_grad_(False).eval()


def _draw(
    weight: Tensor, size: int, strength: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Return P [out, size], Q [size, in]; their product has `strength` times the weight's norm."""
    if not 0.0 <= strength <= MAX_STRENGTH:
        raise InvalidRequest(
            f"the obfuscation is of strength {strength:g}, expected 0 to {MAX_STRENGTH:g}",
            param="obfuscate",
        )
    Q = _normal(rng, size, weight.shape[1])
    P = _normal(rng, weight.shape[0], size)
    norm = torch.linalg.matrix_norm(P @ Q)
    return P * (strength * torch.linalg.matrix_norm(weight) / norm.clamp(min=1e-12)), Q


def _mixed(own: Branches, P: Tensor, Q: Tensor, rng: np.random.Generator) -> Branches:
    """Return [B P] S^-1 and S [A; Q], the rows orthonormal: no row is a branch by itself."""
    A, B = torch.cat([own.A, Q]).double(), torch.cat([own.B_sum, P], 1).double()
    mixed = torch.from_numpy(rng.standard_normal((len(A), len(A)))) @ A
    rows = torch.linalg.qr(mixed.T)[0].T  # spans what A spans: at most `in` rows
    B = B @ (A @ rows.T)
    A, B = rows.float().contiguous(), B.float()
    return Branches(A, None, B, torch.zeros_like(B)).requires_grad_(False)


def _shuffled(A: Tensor, tau: Tensor, B: Tensor, rng: np.random.Generator) -> Branches:
    """Return the same units in a random order and of random lengths: relu(s z) = s relu(z)."""
    order = torch.from_numpy(rng.permutation(len(A)))
    lengths = torch.exp2(torch.from_numpy(rng.uniform(-1, 1, len(A))).float())
    scale = (lengths / A.norm(dim=1).clamp(min=1e-12))[order]
    A, tau, B = A[order] * scale[:, None], tau[order] * scale, B[:, order] / scale
    return Branches(A, tau, B, torch.zeros_like(B)).requires_grad_(False)


def _with(model: nn.Sequential, module: str, weight: Tensor, bias: Tensor) -> nn.Sequential:
    if not isinstance(model.get_submodule(module), nn.Linear) or "." in module:
        raise StartupError(f"{module} is no linear of the stack itself")
    layers = [
        _linear(weight, bias) if name == module else layer for name, layer in model.named_children()
    ]
    return nn.Sequential(*layers).requires_grad_(False).eval()


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    found = nn.Linear(weight.shape[1], weight.shape[0])
    found.weight, found.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach())
    return found


def _normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


def seed_of(secret: bytes) -> np.random.Generator:
    """Return randomness that only whoever has the secret can repeat."""
    return np.random.default_rng(np.frombuffer(secret, "<u4").tolist())
