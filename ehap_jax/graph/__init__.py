"""Functions as graphs: tracing, channel groups and costs."""

from ehap_jax.graph.architecture import architecture_fingerprint
from ehap_jax.graph.channels import (
    ChannelGroup,
    ChannelStructure,
    UnknownPrimitiveError,
    channel_groups,
    channel_structure,
)
from ehap_jax.graph.cost import Cost, count_cost
from ehap_jax.graph.digest import program_digest
from ehap_jax.graph.draw import draw_groups
from ehap_jax.graph.explain import explain
from ehap_jax.graph.interpret import RULES, Rule, evaluate, evaluate_call, register
from ehap_jax.graph.trace import Graph, Node, Value, trace_graph

__all__ = [
    "RULES",
    "ChannelGroup",
    "ChannelStructure",
    "Cost",
    "Graph",
    "Node",
    "Rule",
    "UnknownPrimitiveError",
    "Value",
    "architecture_fingerprint",
    "channel_groups",
    "channel_structure",
    "count_cost",
    "draw_groups",
    "evaluate",
    "evaluate_call",
    "explain",
    "program_digest",
    "register",
    "trace_graph",
]
