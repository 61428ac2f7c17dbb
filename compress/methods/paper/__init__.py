"""ProcrustesGPT (arXiv 2506.02818) as published: the baseline that our own fits are measured against.

shapes       the paper's structures for every linear of a model
accounting   the paper's percentages, and what the same model costs at run time
projections  its weighted fits of Kronecker sums and group-and-shuffle matrices
descent      its rotation solver: Cayley transform and non-linear conjugate gradients
solver       both stages, position by position
blocks       the result as the files that a checkpoint is written from
compare      its rotation solver against ours, on one position
"""
