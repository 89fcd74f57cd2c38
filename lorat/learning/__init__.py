"""How the network learns: losses, optimiser, augmentation on the device, and the loop."""
