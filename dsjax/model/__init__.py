"""DeepSeek-V3 and its kin as flax.nnx modules.

Shape legend, here and in every signature below: B batch, S sequence, T tokens, D embed (hidden
size), H heads, E routed experts, K experts chosen per token, F expert width, R latent rank,
V vocabulary.
"""
