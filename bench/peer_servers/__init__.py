"""The peer servers that `python -m bench.compare` can install and run, one file each."""

from __future__ import annotations

from collections.abc import Mapping

from bench.peer_servers.base import PeerServer
from bench.peer_servers.llama_cpp import LlamaCpp
from bench.peer_servers.mistral_rs import MistralRs
from bench.peer_servers.vllm_cpu import VllmCpu


def peer_servers(llama_outtype: str | None = None) -> Mapping[str, PeerServer]:
    """Return name -> peer, in the order in which they are measured."""
    peers: tuple[PeerServer, ...] = (LlamaCpp(llama_outtype), MistralRs(), VllmCpu())
    return {peer.name: peer for peer in peers}
