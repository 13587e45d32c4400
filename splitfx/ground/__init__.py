"""What every layer stands on and none of it is about networks: text, names, limits, locks, typed documents."""
