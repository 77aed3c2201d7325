"""Many runs as processes of their own: who runs what, on which devices, and what becomes of it."""
