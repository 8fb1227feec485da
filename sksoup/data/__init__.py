"""Convert rows and labels in any form to minibatches of tensors on a device."""
