"""What computes instructions: the `Backend` protocol, and `backend` that opens one by name."""

from pctt.backends.operations import BACKENDS, Backend, BackendUnavailable, DeviceLost, backend

__all__ = ["BACKENDS", "Backend", "BackendUnavailable", "DeviceLost", "backend"]
