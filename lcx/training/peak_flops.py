"""What the devices could do: the peak that model FLOP utilisation (MFU) is measured against."""

import jax

# Dense matrix products, FLOP/s per device in bfloat16, from the makers' data sheets; matched as substrings.
PEAKS = (
    ("H200", 989e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("B200", 2250e12),
    ("TPU v6", 918e12),
    ("TPU v5p", 459e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v4", 275e12),
)


def peak_flops() -> float | None:
    """FLOP/s of all devices together, or None for a device without a data sheet value.

    A CPU has none: what its cores reach changes with the number type, with their clock and with other work on them.
    """
    kind = jax.devices()[0].device_kind
    return next((peak * jax.device_count() for name, peak in PEAKS if name in kind), None)
