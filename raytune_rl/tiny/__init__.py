"""A toy world that needs no download: a Qwen2 of 2.5 M parameters and a data set of small sums.

The demo trains it, and the tests use it wherever they want the real model, tokenizer and engine code at
toy size.
"""
