"""Names, versions, digests and bytes of adapters. Knows no tensors and no HTTP; never imports
torch.
"""
