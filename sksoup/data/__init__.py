"""Rows and labels in any form -> tensors on a device, in minibatches."""
