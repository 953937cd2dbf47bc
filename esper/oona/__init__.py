"""Oona, the message bus."""

from esper.oona._bus import Bus, InProcessBus, Message, Subscription, Topic

__all__ = ["Bus", "InProcessBus", "Message", "Subscription", "Topic"]
