"""The policy that learns: what it makes of a model's graph."""

from esper.tamiyo.policy._message_passing import GraphAttention, MessagePassing

__all__ = ["GraphAttention", "MessagePassing"]
