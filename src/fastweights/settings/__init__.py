"""Everything that can be set, as dataclasses, which command line and library share.

Nothing here imports torch: a command's help need not wait for it.
"""
