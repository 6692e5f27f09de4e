"""Logits adjusted on the GPU before tokens are chosen: penalties, logit_bias, min_tokens. No graph op, like sampling.

    count      the tokens that a step computes are counted, each sequence's in its slot
    listed     logits of tokens that a slot lists are raised, lowered, or banned
    penalized  logits of tokens that a slot has counted are penalized

``zoo.runtime.adjusting`` says what a slot holds. Logits come out to the bit as ``zoo.runtime.sampler`` adjusts them on the host.

What is counted is what a step computes, whose keys and values go into the cache: every known token once, prompts chunk by chunk,
the newest one in the step after it was sampled, when its name is resolved. So the host has nothing to say of it; a sequence that
starts over counts again from nothing; and no step costs more for a longer context.

Only rows with a slot do anything, and steps without such rows launch none of these.
"""
