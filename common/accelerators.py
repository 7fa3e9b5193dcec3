"""Peak arithmetic of accelerators, from the vendors' data sheets."""

# Dense TFLOP/s: (bf16 with fp32 sums, fp32 as torch computes it by default).
PEAK_TFLOPS = {
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "B200": (2250.0, 75.0),
}


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Return the dense peak (TFLOP/s) of a device for `bf16` or `fp32`, None for one that is not listed."""
    found = next((peaks for known, peaks in PEAK_TFLOPS.items() if known in device_name), None)
    return None if found is None else found[0 if precision == "bf16" else 1]
