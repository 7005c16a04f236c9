"""Sequence mixers: one file each. This page is the whole contract.

A mixer is a Flax module with two methods::

    __call__(x [B,T,D], *, positions [B,T] | None, segment_ids [B,T] | None, cache=None) -> (y [B,T,D], cache)
    init_cache(batch_size, length, dtype) -> pytree of arrays

Rules that the battery in ``tests/test_mixers.py`` holds every mixer to:

- y[:, t] depends on x[:, :t + 1] alone, and only on tokens of the same segment; segment id 0 is padding.
- Padding before or after the tokens of a row changes none of them, in value and gradient, whatever is in it. Padding
  between two tokens of one document is outside this contract: convolutions count it as distance, others may not.
- ``positions`` count from 0 in every segment; None means 0..T-1 for every row, and segment_ids None means one segment.
- With a cache the T tokens follow those already in it, and the returned cache holds them too: prefill in one piece,
  in two, and token by token give the same outputs.

A mixer whose cache grows with the text has two things more::

    __call__(..., cache, deferred=True) -> (y, what these tokens add to the cache)
    append_cache(cache, added) -> cache, for one layer or for several stacked ones

A decoder asks for it: its scan over layers would otherwise take whole caches in and give whole caches out, and copy
each several times for every token.

A mixer that cannot read a prompt in pieces says so: ``whole_prompt = True``, an attribute or property.

What a mixer (or an MLP) sows into the collection ``losses`` is added to the training loss (``objectives.next_token``).

There is no registry: a config or a user's own package names the class.
"""
