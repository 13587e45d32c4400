"""The canonical graph as data, and what is known of an operation."""
