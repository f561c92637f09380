"""Fused decode steps for Llama-like models at small batch, where a step costs what reading the weights costs.

`structure` reads a model as data and decides whether it is one that the fused steps compute; `reference` is the step in
plain PyTorch. The generic way, Hugging Face's layer under `torch.compile`, serves everything else.
"""
