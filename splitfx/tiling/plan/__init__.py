"""Which pieces of a stage are computed when, within which memory."""
