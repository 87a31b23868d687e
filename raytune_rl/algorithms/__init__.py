"""The mathematics: pure functions of numpy scalars (driver) and flat torch token tensors (workers).

Nothing here knows Ray, Transformers, files or processes. An algorithm is one small file plus one line of
registration.
"""
