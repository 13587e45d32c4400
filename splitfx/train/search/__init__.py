"""The search for factors: which plan of `Group` keeps the accuracy, or which are worth their cost.

`space` is what is searched, `tuner` how a split is trained and scored, `study` where the trials are kept. `greedy`
finds the largest factor of each block (MalekHosseini et al.), `front` the plans between which accuracy, work and peak
are a choice, and `preview` lists the trials without training.
"""
