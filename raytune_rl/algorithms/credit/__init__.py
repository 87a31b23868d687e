"""One file a credit: who earned what. A file that is put here is found by itself; no other file lists
credits.
"""
