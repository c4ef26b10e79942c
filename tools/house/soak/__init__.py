"""`tools/dev soak`: guests that do, for a long time, things whose outcome is known, to find what is rarely wrong.

It needs the package `ringzero`, so it is a program of its own that `tools/dev` starts in the virtual environment.
"""
