"""The commands, one file each: ``TEXT`` says what it does, ``arguments`` adds what it takes to its parser, ``run`` does
it, prints to stdout and returns the exit code.

Everything that can be refused is refused before work starts: files that are there already, plans, passes. All but the
parser is imported inside ``run``, so that ``splitfx --help`` answers at once.
"""
