"""The only door to transformers: cache, attention, target, generate, hooks, packed layers,
vocabularies, rotary positions, the weights of a Llama.

A new version of transformers breaks here or nowhere; ``tests/hf`` holds one contract test an item.
"""
