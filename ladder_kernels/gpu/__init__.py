"""Triton kernels and their launchers: the CUDA side of the ops. Arguments are taken as checked.

Importing a module here needs Triton, so the ops import it only once they hold a CUDA tensor. Under Triton's interpreter
the launchers take CPU tensors.
"""
