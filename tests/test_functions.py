"""Functions of scores and masks: the ready-made ones in every implementation, caches, transformations, what is refused.

With every other option they are in the table of `test_every_pair_of_options`.
"""
