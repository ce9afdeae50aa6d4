"""What only a training needs: its step's compilation, losses of an epoch, optimizers, resuming.

Nothing here knows the Lightning modules; they call it.
"""
