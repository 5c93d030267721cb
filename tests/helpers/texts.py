"""Messages: what one must carry, without its wording."""

from __future__ import annotations


def missing_from(text: str, *parts: str) -> list[str]:
    """Return the parts that a message lacks; an assertion on it shows them and the message."""
    absent = [part for part in parts if part not in text]
    return [*absent, text] if absent else []
