"""Training for people without a loop of their own: `finetune`, its data, and what it writes down.

A graph from `splitfx.transform` is an ordinary module; whoever has a training loop needs nothing of this package.
"""
