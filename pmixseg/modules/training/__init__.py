"""Parts of a module that only a training needs: compilation, loss log, optimizers, resuming.

Nothing here knows the Lightning modules; they call it.
"""
