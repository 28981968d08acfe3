"""The device mesh, the sharding of parameters, and transfers of host batches."""
