"""MLPs: one file for each kind. This page is the whole contract.

An MLP is a Flax module with one method, which maps every token by itself::

    __call__(x [B,T,D]) -> y [B,T,D]        y[b, t] depends on x[b, t] alone

It keeps no state, so decoding asks nothing else of it, and it runs in the dtype of x. What the rest of the library uses
if it is there:

- Parameters made by ``layers.Linear`` and ``layers.named_param`` carry the names of their axes, by which
  ``sharding.RULES`` places them on a mesh. LoRA adds its pairs to a ``Linear`` whose path its ``targets`` match. Other
  parameters are kept whole on every device. The projections are called ``gate_proj``, ``up_proj`` and ``down_proj``.
- An MLP whose statistics must not count padding says so with the class attribute ``takes_segment_ids = True``. It is
  then called with ``segment_ids=`` too ([B,T], 0 is padding; None: there is none).
- What it sows into the collection ``losses`` is added to the training loss: see ``objectives.next_token``.

There is no registry: a config or a user's own package names the class.
"""
