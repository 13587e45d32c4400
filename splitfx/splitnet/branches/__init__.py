"""A carved model as its tree: parts, their files, and their runner."""
