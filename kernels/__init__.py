"""Triton kernels; in this folder of the checkout, installed as `tiedkl.kernels`."""

if __name__ != "tiedkl.kernels":
    raise ImportError(
        f"this package is part of tiedkl and must be imported as 'tiedkl.kernels', not as {__name__!r}; "
        "the repository root is on sys.path ahead of whatever else is called so: "
        "run `pytest` and not `python -m pytest`, or leave the root"
    )
