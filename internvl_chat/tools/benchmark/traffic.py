"""What DeepSpeed's ZeRO moves between ranks in a step, counted from sizes of parameters, and how long that takes."""

from typing import NamedTuple

# Each byte of the whole tensor crosses a rank's link this many times, less a rank's own part: rings and trees alike.
CROSSINGS = {"all_reduce": 2, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}


class Network(NamedTuple):
    """Bytes a second, each way: of a GPU within its node, and of a GPU's share of the node's links to others."""

    within: float
    between: float
    gpus_a_node: int = 8


def counted(stage: int, trained: int, weights: int) -> dict[str, int]:
    """Collective -> bytes of the whole tensors that a step of one forward and backward pass sends through it.

    ZeRO-1 and -2 add up whole gradients (DeepSpeed 0.19, whatever `reduce_scatter` says) and spread the new weights.
    ZeRO-3 gathers all weights for the forward pass and again for the backward pass, in which layers that are computed
    again are gathered once; it keeps small ones, and gathers what several calls use more often: the log tells how much.

    Args:
        trained, weights: bytes of all parameters that train, and of all.
    """
    if stage < 3:
        return {"all_reduce": trained, "all_gather_into_tensor": trained}
    return {"all_gather_into_tensor": 2 * weights, "reduce_scatter_tensor": trained}


def seconds(moved: dict[str, int], ranks: int, network: Network) -> float:
    """Of the collectives at full bandwidth: the slower of links within nodes and of the links of all GPUs of a node
    together, through which every byte from other nodes comes in once."""
    total = sum(CROSSINGS[name] * size for name, size in moved.items())
    nodes = -(-ranks // network.gpus_a_node)
    within = total * (ranks - 1) / ranks / network.within
    return max(within, total * (nodes - 1) / nodes / (network.between * min(ranks, network.gpus_a_node)))
