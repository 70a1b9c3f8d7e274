"""What an uploaded adapter may cost. Every number is an upper bound; nothing here reads a file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Bounds on one upload and on the process that validates it; sizes in bytes, times in seconds.

    A safetensors header costs about 150 bytes a tensor: 4 MiB hold 28,000 tensors, 25 times what a
    rank-any LoRA on all seven linears of an 80-layer model needs, while the parsed form (about 20
    times the text) stays below 100 MB.
    """

    file_bytes: int = 4 << 30
    total_bytes: int = 8 << 30
    num_files: int = 256
    config_bytes: int = 1 << 20
    json_depth: int = 16
    header_bytes: int = 4 << 20
    num_tensors: int = 32_768
    num_dims: int = 8
    name_chars: int = 512  # of a tensor's name and of a file's name
    validator_memory: int = 1 << 30  # address space beyond the mapped checkpoint
    validator_cpu_s: int = 60
    validator_wall_s: float = 90.0
    verdict_bytes: int = 4 << 20
