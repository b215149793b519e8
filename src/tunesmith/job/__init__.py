"""The half that runs inside the training environment.

Python 3.10, and nothing but what configs/locks/<flavour>.txt holds. It imports
nothing of the control half, so the same code runs on the laptop, on a host and as
the image's entry point. Importing this package loads neither torch nor transformers.
"""
