"""Classes of other packages that run on pyflow's ops; import the module of the package you use."""
