"""From finished runs to answers; reads run directories, imports no PyTorch."""
