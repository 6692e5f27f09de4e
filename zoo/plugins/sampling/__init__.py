"""Tokens from logits on the GPU, without sorting. No graph op: a session runs these launches behind the graph's own.

    greedy    the largest logit of each row, the lowest id among equals
    sample    each row by its ``SAMPLING`` record (``zoo.runtime.abi``): temperature, top_k, top_p, min_p, seed, counter
    resolve   token ids that name a row of the step before, -(r + 1), become that row's token

What adjusts logits before is in ``zoo.plugins.adjusting``.

Order and meaning are ``zoo.runtime.sampler``'s, with two differences that no test of a distribution sees: tokens equally
likely as the last one of a nucleus are all in it, and a nucleus of very many tokens may take in, or leave out, tokens that
together have a part 2**-17 of its probability.

A seed gives other tokens here than on the host, whose random numbers are others.

A row whose largest logit is no finite number, where NaN counts as largest, gives -1.

A row is read once, in groups of 64 logits, each of which leaves its largest one and the sum of its exponentials. From those
a token is drawn in two steps, a group and then a logit in it, by inversion; or, with top_k, top_p or min_p, a bound is found
below which nothing can be kept, and only groups that reach it are looked at again: their logits are searched, by bisection,
for the least one that is kept. Random numbers are Philox 4x32-10 (Salmon et al. 2011) of seed and counter, and everything
about a row is computed in the same order however many rows there are: batch mates cannot change its token.
"""
