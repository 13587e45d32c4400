"""What Group and SplitNet share: a block-diagonal layer run as the narrow layers that it is."""
