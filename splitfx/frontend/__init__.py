"""From the user's model to the canonical graph."""
