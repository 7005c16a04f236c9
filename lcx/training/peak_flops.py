"""Peak FLOP/s of the devices, the reference for model FLOP utilisation (MFU)."""

import jax

# Peak of dense bfloat16 matrix products in FLOP/s per device, from the vendors' data sheets. The first entry whose name
# is a substring of jax's device_kind is used.
PEAKS = (
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("B200", 2250e12),
    ("TPU v6", 918e12),
    ("TPU v5p", 459e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # what jax calls a v5p
    ("TPU v4 lite", 138e12),
    ("TPU v4", 275e12),
)


def peak_flops() -> float | None:
    """Peak FLOP/s of all devices together, or None for a device that is not in PEAKS.

    CPUs are not listed: what their cores reach depends on the data type, the clock rate and the other load.
    """
    kind = jax.devices()[0].device_kind
    return next((peak * jax.device_count() for name, peak in PEAKS if name in kind), None)
