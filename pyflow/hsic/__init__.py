"""What the operations, statistics and modules of HSIC share; for users they are in `pyflow.ops`, `stats` and `nn`.

A call of `pyflow.ops.hsic(x, y, ...)`:

1. `kernels.kernel_specs` makes one `KernelSpec` per variable of the arguments kernel, bandwidth, degree, ...
2. `inputs.variables` checks x and y and converts each into a `Variable`, rows and kernel as the operators take them:
   rows of distance kernels in `distances`, of dot products in `products`; `powers` keeps them in range, and `median`
   is the bandwidth where none is given.
3. `estimators.values` asks `pyflow.ops.hsic.sums`, which calls the operator `hsic_sums`, for sums over the tiles of the
   kernel matrices, and makes HSIC of them. With `approximate`, `features.approximation` takes its place.

`regularised` is the matrix of nHSIC. Of `pyflow.ops`, this package imports `noise` only.
"""
